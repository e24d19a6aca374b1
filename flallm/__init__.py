"""flallm: gloss-free sign language translation after FLa-LLM.

Chen et al. 2024, arXiv 2403.12556.
"""

__version__ = "0.1.0"


def load(folder, device="cpu"):
    """The model of a folder that `flallm export` wrote, or of a run.

    `load(folder).translate(video)` is a sentence.
    """
    from flallm.inference.export import Model

    return Model(folder, device)
