"""`flallm probe` and `flallm report`: a run that sees and one that cannot, and the page in a real Chromium."""

import json
import random
import re
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import SMALL
from playwright.sync_api import sync_playwright
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.dataset import Batch
from flallm.data.encode import EncodeOptions
from flallm.data.reader import Shards
from flallm.data.shards import make_shards
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation import metrics, plots
from flallm.evaluation import probe as probes
from flallm.evaluation.decode import Prediction, evaluate, swapped
from flallm.evaluation.probe import probe
from flallm.report import charts as report_charts
from flallm.report import report
from flallm.training.logger import NUM_LOGGED_CLIPS
from flallm.training.train import train

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CLIPS = 5  # that are learnt by heart
HOSTILE = [
    '<script>window.broken = 1</script><img src=x onerror="window.broken = 1">',
    "שלום \u202e evil \u202c world",
    "a \0 b \x1b[31m \ud800",
    "👩‍🚀 👍🏽 e\u0301",
    "word " * 2000,
    "</script><style>* { display: none }</style> {{ 7 * 7 }} &amp;",
    "",
]


def train_and_probe(configs, out):
    ranks = init_distributed()
    for name, config in configs.items():
        train(config, out / name, ranks)
        probe(out / name, "dev", ranks)
    evaluate(out / "seeing", "dev", ranks)


def again(run, out):
    ranks = init_distributed()
    if ranks.is_main:
        shutil.copytree(run, out, ignore=shutil.ignore_patterns("predictions", "scores", "probes"))
    ranks.gather(None)
    evaluate(out, "dev", ranks)
    probe(out, "dev", ranks)


@pytest.fixture(scope="module")
def runs(llm, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed")
    clips = list(synthetic.clips(train=CLIPS, dev=0, test=0, size=36))
    corpora = {"seeing": clips, "blind": [replace(c, media=clips[0].media) for c in clips]}
    configs = {}
    for name, those in corpora.items():
        make_shards([*those, *(replace(c, split="dev") for c in those)], out / f"{name}-shards", EncodeOptions(), {"name": "manifest"})
        settings = {
            "name": "phoenix14t",
            "train.steps": 160,
            "train.batch": CLIPS,
            "train.dev_every": 80,
            "train.label_smoothing": 0,
            "data.augment.probability": 0,
        }
        model = {"light_t.width": 128, "encoder.widths": [16, 32, 32, 64], "data.shards": str(out / f"{name}-shards"), "llm.path": str(llm)}
        configs[name] = cfg.load("demo", "stage1", SMALL | settings | model | ({"train.steps": 40} if name == "blind" else {}))
    spawn(train_and_probe, 1, configs, out)
    table = {
        "title": "Table 9, what is frozen",
        "leading": "bleu4",
        "dev_leading": "bleu4",
        "rows": {"nothing": {"bleu4": {"mean": 3.0, "values": [3.0], "ci95": [2.0, 4.0]}, "paper": {}, "dev": [[[[160, 3.0]]]]}},
    }  # as flallm ablate leaves it
    (out / "table-9.md").write_text(
        "**Table 9, what is frozen**\n\n| | B4 [95 %] |\n|---|---|\n| nothing | 3.00 [2.00, 4.00] |\n\ndemo, one seed\n\n![x](table-9.png)\n"
    )
    plots.table(table, out / "table-9.png")
    return out


def test_probes_tell_a_run_that_sees_from_one_that_cannot(runs):
    seeing, blind = (json.loads((runs / name / "probes/dev.json").read_text()) for name in ("seeing", "blind"))
    assert seeing["videos"]["the right one"]["bleu4"]["value"] == pytest.approx(100)
    assert seeing["seen_share"] > 0.6 and "hardly looks" not in seeing["verdict"]
    assert seeing["videos"]["another clip's"]["changed"] == 1 and seeing["videos"]["the mean feature"]["changed"] > 0.5
    assert "hardly looks" in blind["verdict"] and blind["repeated"]["share"] == 1
    assert seeing["groups"]["sentence is in the training text"]["num_samples"] == CLIPS and seeing["overlap"]["hypothesis"]["sentences"] == 1
    swapped = [json.loads((runs / "seeing/scores/dev.json").read_text())[name] for name in ("swapped_bleu4", "raw")]
    assert swapped[0] < 50 < swapped[1]["bleu4"]["value"]


def judged(references: list[str], hypotheses: list[str]) -> dict:
    """The verdict on a model that says one word, the most frequent one, where it sees nothing."""
    blind = [max(references, key=references.count)] * len(references)
    right = [Prediction(f"{n:03}", r, h) for n, (r, h) in enumerate(zip(references, hypotheses))]
    other = swapped(hypotheses, references)
    return probes._judge({"the right one": hypotheses, "another clip's": other, "noise": blind, "the mean feature": blind}, right, "raw")


@pytest.mark.parametrize(
    "references",
    [
        ["yes", "no"] * 20,
        [f"sign{n % 20}" for n in range(40)],  # of two signers, the list of the one after that of the other
        ["good morning", "thank you", "see you later", "no"] * 10,
        ["how are you", "no"] * 5 + ["where do you live now"],
        [f"today it rains in the {place} of the country" for place in ("north", "south", "east")] * 4,
    ],
    ids=["two signs", "two signers", "up to three words", "mixed", "sentences"],
)
def test_a_perfect_model_is_said_to_look_and_a_blind_one_is_not_whatever_the_lengths(references):
    perfect = judged(references, references)
    leading = perfect["leading"]
    assert perfect["videos"]["the right one"][leading]["value"] == pytest.approx(100)
    assert "hardly looks" not in perfect["verdict"] and metrics.LABELS[leading] in perfect["verdict"]
    blind = judged(references, [max(references, key=references.count)] * len(references))
    assert "hardly looks" in blind["verdict"]
    assert all(a != b for a, b in zip(swapped(references, references), references))


def test_clips_are_swapped_with_those_half_a_split_further():
    references = [f"sentence {n}" for n in range(5)] + ["sentence 0"] + [f"sentence {n}" for n in range(6, 11)]
    assert swapped(list("abcdefghijk"), references) == list("fghijkabcde")  # one of eleven has the same sentence: under a tenth
    assert swapped(["a"], ["a"]) == ["a"] and swapped(["x", "y", "z"], ["a"] * 3) == ["y", "z", "x"]


def test_videos_are_spoilt_clip_by_clip_in_the_way_that_is_said():
    frames, lengths = torch.arange(8 * 2 * 2 * 3, dtype=torch.uint8).reshape(8, 2, 2, 3), torch.tensor([5, 3])
    video = Batch(frames, lengths, torch.zeros(2, 1), ["a", "b"], ["", ""], [])
    order = {change: change(video).frames[:, 0, 0, 0].div(12, rounding_mode="floor").tolist() for change in (probes._reverse, probes._freeze)}
    assert list(order.values()) == [[4, 3, 2, 1, 0, 7, 6, 5], [2] * 5 + [6] * 3]
    features = replace(video, frames=torch.randn(8, 500) * torch.tensor([3.0] * 5 + [0.1] * 3)[:, None])
    for batch in (video, features):
        noise = probes._noise(batch)
        alone = replace(batch, frames=batch.frames[5:], lengths=lengths[1:], keys=["b"])
        assert noise.frames.shape == batch.frames.shape and torch.equal(noise.frames[5:], probes._noise(alone).frames)
    spread = [part.std().item() for part in noise.frames.split([5, 3])]
    assert spread == pytest.approx([3.0, 0.1], rel=0.1)


def test_a_split_is_scored_in_parts_by_signer_and_length(shards):
    dev = Shards(shards, "dev")
    right = [Prediction(meta["key"], meta["text"], meta["text"]) for meta in dev.metas()]
    groups = {name: part["num_samples"] for name, part in probes._parts(right, "raw", dev, probes.training_clips(str(shards)))["groups"].items()}
    assert groups["signer is not in training"] == len(right) and "signer is in training" not in groups
    assert sum(count for name, count in groups.items() if "words" in name) == len(right) and len(groups) > 4
    train = [meta | {"signer": dev.meta(0)["signer"]} for meta in probes.training_clips(str(shards))]
    those = [meta["signer"] for meta in dev.metas()].count(dev.meta(0)["signer"])
    assert probes._parts(right, "raw", dev, train)["groups"]["signer is in training"]["num_samples"] == those


def test_parts_of_short_sentences_have_the_leading_score_where_they_have_its_n_grams(shards):
    dev = Shards(shards, "dev")
    texts = ["good morning", "yes", "thank you", "no", "see you", "hello", "good night", "welcome"]
    right = [Prediction(meta["key"], text, text) for meta, text in zip(dev.metas(), texts, strict=True)]
    found = probes._judge({name: texts for name in ("the right one", *probes.CONTROL)}, right, "raw")
    found |= probes._parts(right, "raw", dev, [{"key": "a", "text": "good morning"}, {"key": "b", "text": "see you"}])
    assert {name: part["bleu2"] and part["bleu2"]["value"] for name, part in found["groups"].items() if "words" in name} == {
        "up to 1 words": None,
        "2 to 2 words": pytest.approx(100),
    }
    assert found["overlap"]["reference"] == {"4-grams": 0.0, "2-grams": 2 / 4, "sentences": 2 / 8}
    table = probes.table(found)
    assert "BLEU-2 [95 %]" in table and "50% of the hypotheses' 2-grams" in table and "BLEU-2 leads in place of BLEU-4" in table


def test_what_the_page_works_out_itself():
    nearest = report.Nearest(["am samstag regnet es im süden", "heute nacht regnet es", "am samstag schneit es im norden", "und nun das wetter"])
    assert nearest("am samstag regnet es im norden länger") == "am samstag regnet es im süden" and nearest("ganz anders") == ""
    missed, wrong = report._differences(["a", "b", "c"], ["a", "x", "c", "d"], "a b c", "a x c d")
    assert [part for part, differs in missed if differs] == ["b"] and [part for part, differs in wrong if differs] == ["x", "d"]
    # 30 seconds: 5 on dev, and of the others a quarter waiting, then none.
    rows = [{"dev_seconds": 5.0}, {"seconds": 25.0, "data_wait_share": 0.25}, {"seconds": 30.0, "data_wait_share": 0.0}]
    assert report._time(rows) == [("training steps", 20.0), ("waiting for data", 5.0), ("dev scores", 5.0)]
    (waiting,) = report_charts.charts([{"step": 7, "data_wait_share": 0.25}])
    assert (waiting.unit, waiting.steps, waiting.series[0].values) == ("%", [7], [25.0])


def curves(chart):
    """The points (x, y) of each line of a chart, in the SVG's coordinates: y grows downwards."""
    paths = ElementTree.fromstring(report_charts.draw(chart)).iter("{http://www.w3.org/2000/svg}path")
    colors = ("--accent", "--other", "--third")
    drawn = [path.get("d") for path in paths if any(f"stroke: var({c})" in path.get("style", "") for c in colors)]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)] for path in drawn]


def test_a_chart_draws_its_values():
    rows = [{"step": step, "lr_encoder": 0.0, "lr_adapter": 1e-4 * step, "lr_language": 2e-4 * step} for step in range(1, 101)]
    del rows[50]["lr_adapter"]
    (chart,) = report_charts.charts(rows)
    adapter, language = curves(chart)[:2]  # the legend's lines come after them
    assert [series.label for series in chart.series] == ["adapter", "language model"]  # the encoder does not train
    assert adapter[0][1] > adapter[-1][1] > language[-1][1]
    assert adapter[0][1] - adapter[-1][1] == pytest.approx((language[0][1] - language[-1][1]) / 2, rel=1e-3)
    assert report_charts.draw(chart) == report_charts.draw(chart)


def test_a_chart_of_a_long_run_stays_small_and_keeps_a_spike():
    values = random.Random(0)
    rows = [{"step": step, "loss": values.uniform(1, 2)} for step in range(100_000)]
    rows[70_000]["loss"] = 10.0
    (chart,) = report_charts.charts(rows)
    points = curves(chart)[0]
    x, y = min(points, key=lambda point: point[1])
    assert len(points) < 1500
    assert x - points[0][0] == pytest.approx(0.7 * (points[-1][0] - points[0][0]), abs=1)
    assert points[0][1] - y > 50  # of the 166 points (1/72 inch) of the chart's height


def test_every_figure_is_the_same_on_another_number_of_ranks(runs, tmp_path):
    spawn(again, 2, runs / "seeing", tmp_path / "run")  # 3 clips for one rank and 2 for the other
    for name in ("predictions/dev.jsonl", "scores/dev.json", "probes/dev.json"):
        assert (tmp_path / "run" / name).read_bytes() == (runs / "seeing" / name).read_bytes(), name


def test_tensorboard_has_the_curves_of_a_run_and_shows_dev_clips(runs):
    events = EventAccumulator(str(runs / "seeing/tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss", "clips_per_s", "data_wait_share", "lr_encoder", "dev_bleu4", "hparams/dev_bleu4"} <= {*tags["scalars"]}
    keys = {tag.split("/")[1] for tag in tags["tensors"] if tag.startswith("dev/")}
    assert len(keys) == NUM_LOGGED_CLIPS and {f"{kind}/{key}" for key in keys for kind in ("dev", "dev_attention")} <= {*tags["images"]}
    assert len(events.Images("dev/" + min(keys))) == 1 and events.Images("dev/" + min(keys))[0].encoded_image_string.startswith(b"GIF")
    assert len(events.Images("dev_attention/" + min(keys))) == 2


def test_a_split_without_sentences_is_a_mistake_and_the_page_stays(runs, flallm):
    (runs / "seeing/report.html").write_text("a page")
    (runs / "seeing/predictions/._dev.jsonl").write_bytes(b"\0\5\x16\7\xff")  # macOS leaves it beside dev.jsonl
    done = flallm("report", runs / "seeing", "--split=dve", cwd=runs)
    assert done.returncode == 2 and "has no sentences of dve but of dev: " in done.stderr and (runs / "seeing/report.html").read_text() == "a page"


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install -y --no-install-recommends chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, **options):
    """The page, and what it complained of."""
    page, said = browser.new_page(**options), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or said.append(request.url))
    page.goto(path.as_uri())
    return page, said


def test_the_page_is_searched_sorted_and_played(runs, chromium):
    path = report.report(runs / "seeing", "dev", 3)
    page, said = opened(chromium, path)
    sentences = [json.loads(line) for line in (runs / "seeing/predictions/dev.jsonl").read_text().splitlines()]
    assert page.locator("#list > li:visible").count() == CLIPS
    word = max((word for s in sentences for word in s["reference"].split()), key=len)
    page.fill("#search", word.upper())
    assert page.locator("#list > li:visible").count() == sum(word in s["reference"] for s in sentences) < CLIPS
    page.fill("#search", "")
    page.select_option("#sort", "-length")
    lengths = page.locator("#list > li").evaluate_all("found => found.map((e) => Number(e.dataset.length))")
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1
    page.check("#clips")
    assert page.locator("#list > li:visible").count() == 3
    clip = page.locator("video:visible").first
    clip.evaluate("video => video.play()")
    page.wait_for_function("video => video.currentTime > 0", arg=clip.element_handle())
    clip.evaluate("video => video.pause()")
    word = page.locator(".attention button").last
    word.click()
    page.wait_for_function(
        "word => Math.abs(word.closest('li').querySelector('video').currentTime / word.closest('li').querySelector('video').duration - word.dataset.at) < .05",
        arg=word.element_handle(),
    )
    assert page.locator(".chart svg").count() == page.locator(".chart").count() >= 5
    assert page.get_by_role("img", name="Loss over the steps").is_visible()
    ids = page.locator("[id]").evaluate_all("elements => elements.map((e) => e.id)")
    assert len(ids) == len(set(ids))
    assert page.locator("#ablations tbody").inner_text().split("\t") == ["nothing", "3.00 [2.00, 4.00]"]
    assert page.locator("#ablations img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    published = page.locator("table", has_text="GFSLT-VLP").inner_text()  # by the recipe's name: a manifest is of no known data set
    assert published.index("this run") < published.index("FLa-LLM") and f"{CLIPS} sentences were scored here, 642 there" in page.locator("main").inner_text()
    assert "100.00" in page.locator("header").inner_text() and "from seeing" in page.locator("header").inner_text()
    assert said == []


@pytest.mark.parametrize("options", ({"viewport": {"width": 360, "height": 740}}, {"color_scheme": "dark"}), ids=("phone", "dark"))
def test_the_page_is_accessible_and_fits(runs, chromium, options):
    page, said = opened(chromium, report.report(runs / "seeing", "dev", 2), **options)
    page.evaluate("document.querySelectorAll('details').forEach((e) => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    lines = page.locator(".chart svg [style*='--accent']").evaluate_all("lines => lines.map((e) => getComputedStyle(e).stroke)")
    assert set(lines) == {"rgb(124, 192, 255)" if "color_scheme" in options else "rgb(11, 95, 165)"}
    found = Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
    assert said == []


def test_hostile_text_neither_runs_nor_breaks_the_page(runs, chromium, tmp_path):
    shutil.copytree(runs / "seeing", tmp_path / "run")
    rows = [{"key": f"{i}{text[:50]}", "reference": text or "x", "hypothesis": HOSTILE[i - 1]} for i, text in enumerate(HOSTILE)]
    rows[-1]["hypothesis"] += " \u2028 x"  # a line break to Unicode, which JSON leaves as it is
    (tmp_path / "run/predictions/dev.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", "replace")
    (tmp_path / "run/command.txt").write_text(HOSTILE[0])
    (tmp_path / "run/bad_samples.jsonl").write_text(json.dumps({"key": HOSTILE[0], "cause": HOSTILE[5]}) + "\n{half a li")
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 161, HOSTILE[5]: 1.0, HOSTILE[2]: 2.0}) + "\n")
    page, said = opened(chromium, report.report(tmp_path / "run", "dev", 4))
    assert page.locator("#list > li").count() == len(HOSTILE) and page.evaluate("window.broken") is None
    page.fill("#search", "onerror")
    assert page.locator("#list > li:visible").count() == 2
    assert page.locator("h2").first.is_visible() and said == []


def test_the_page_of_a_run_that_failed_early_opens(runs, chromium, tmp_path):
    run = tmp_path / "runs/stage1/seed0"  # of flallm ablate
    run.mkdir(parents=True)
    shutil.copy(runs / "seeing/config.yaml", run)
    shutil.copy(runs / "table-9.md", tmp_path)
    page, said = opened(chromium, report.report(run, "test", 4))
    assert "flallm evaluate" in page.locator(".notes").inner_text() and said == []
    assert "what is frozen" in page.locator("#ablations").inner_text()
