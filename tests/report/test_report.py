"""`flallm probe` and `flallm report` of a run that sees and one that cannot, in a real Chromium."""

import json
import shutil
from dataclasses import replace

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import SMALL
from playwright.sync_api import sync_playwright
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flallm import config as cfg
from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions
from flallm.data.shards import make_shards
from flallm.distributed.context import init_distributed
from flallm.distributed.launch import spawn
from flallm.evaluation import plots
from flallm.evaluation.decode import evaluate
from flallm.evaluation.probe import probe
from flallm.report.report import report
from flallm.training.logger import NUM_LOGGED_CLIPS
from flallm.training.train import train

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CLIPS = 5  # few enough to be memorised
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


def evaluate_and_probe_a_copy(run, out):
    ranks = init_distributed()
    if ranks.is_main:
        shutil.copytree(run, out, ignore=shutil.ignore_patterns("predictions", "scores", "probes"))
    ranks.gather(None)
    evaluate(out, "dev", ranks)
    probe(out, "dev", ranks)


def config_of(name, shards, llm):
    settings = {
        "name": "phoenix14t",
        "train.steps": 40 if name == "blind" else 160,
        "train.batch": CLIPS,
        "train.dev_every": 80,
        "train.label_smoothing": 0,
        "data.augment.probability": 0,
        "light_t.width": 128,
        "encoder.widths": [16, 32, 32, 64],
        "data.shards": str(shards),
        "llm.path": str(llm),
    }
    return cfg.load("demo", "stage1", SMALL | settings)


def write_ablation_table(out):
    """Writes what flallm ablate leaves beside its runs."""
    score = {"mean": 3.0, "values": [3.0], "ci95": [2.0, 4.0]}
    table = {
        "title": "Table 9, what is frozen",
        "leading": "bleu4",
        "dev_leading": "bleu4",
        "rows": {"nothing": {"bleu4": score, "paper": {}, "dev": [[[[160, 3.0]]]]}},
    }
    (out / "table-9.md").write_text(
        "**Table 9, what is frozen**\n\n| | B4 [95 %] |\n|---|---|\n"
        "| nothing | 3.00 [2.00, 4.00] |\n\ndemo, one seed\n\n![x](table-9.png)\n"
    )
    plots.table(table, out / "table-9.png")


@pytest.fixture(scope="module")
def runs(llm, tmp_path_factory):
    """A run that sees its clips, and one whose clips all show the same video."""
    out = tmp_path_factory.mktemp("probed")
    clips = list(synthetic.clips(train=CLIPS, dev=0, test=0, size=36))
    corpora = {"seeing": clips, "blind": [replace(c, media=clips[0].media) for c in clips]}
    configs = {}
    for name, train_clips in corpora.items():
        shards = out / f"{name}-shards"
        dev_clips = [replace(c, split="dev") for c in train_clips]
        make_shards([*train_clips, *dev_clips], shards, EncodeOptions(), {"name": "manifest"})
        configs[name] = config_of(name, shards, llm)
    spawn(train_and_probe, 1, configs, out)
    write_ablation_table(out)
    return out


def test_probes_tell_a_run_that_sees_from_one_that_cannot(runs):
    probes_of = {}
    for name in ("seeing", "blind"):
        probes_of[name] = json.loads((runs / name / "probes/dev.json").read_text())
    seeing, blind = probes_of["seeing"], probes_of["blind"]
    videos = seeing["videos"]
    assert videos["the right one"]["bleu4"]["value"] == pytest.approx(100)
    assert seeing["seen_share"] > 0.6
    assert "hardly looks" not in seeing["verdict"]
    assert videos["another clip's"]["changed"] == 1
    assert videos["the mean feature"]["changed"] > 0.5
    assert "hardly looks" in blind["verdict"]
    assert blind["repeated"]["share"] == 1
    assert seeing["groups"]["sentence is in the training text"]["num_samples"] == CLIPS
    assert seeing["overlap"]["hypothesis"]["sentences"] == 1
    scores = json.loads((runs / "seeing/scores/dev.json").read_text())
    assert scores["swapped_bleu4"] < 50 < scores["raw"]["bleu4"]["value"]


def test_every_score_is_the_same_on_another_number_of_ranks(runs, tmp_path):
    spawn(
        evaluate_and_probe_a_copy, 2, runs / "seeing", tmp_path / "run"
    )  # 3 clips for one rank and 2 for the other
    for name in ("predictions/dev.jsonl", "scores/dev.json", "probes/dev.json"):
        assert (tmp_path / "run" / name).read_bytes() == (runs / "seeing" / name).read_bytes(), name


def test_tensorboard_has_the_curves_of_a_run_and_shows_dev_clips(runs):
    sizes = {"images": 0, "tensors": 0}
    events = EventAccumulator(str(runs / "seeing/tensorboard"), size_guidance=sizes)
    events.Reload()
    tags = events.Tags()
    scalars = {"loss", "clips_per_s", "data_wait_share", "lr_encoder", "dev_bleu4"}
    assert {*scalars, "hparams/dev_bleu4"} <= {*tags["scalars"]}
    keys = {tag.split("/")[1] for tag in tags["tensors"] if tag.startswith("dev/")}
    assert len(keys) == NUM_LOGGED_CLIPS
    for kind in ("dev", "dev_attention"):
        assert {f"{kind}/{key}" for key in keys} <= {*tags["images"]}
    (clip,) = events.Images("dev/" + min(keys))
    assert clip.encoded_image_string.startswith(b"GIF")
    assert len(events.Images("dev_attention/" + min(keys))) == 2


def test_a_split_without_sentences_is_a_mistake_and_the_page_stays(runs, flallm):
    page = runs / "seeing/report.html"
    page.write_text("a page")
    # macOS leaves such a file beside dev.jsonl.
    (runs / "seeing/predictions/._dev.jsonl").write_bytes(b"\0\5\x16\7\xff")
    result = flallm("report", runs / "seeing", "--split=dve", cwd=runs)
    assert result.returncode == 2
    assert "has no sentences of dve but of dev: " in result.stderr
    assert page.read_text() == "a page"


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install -y --no-install-recommends chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, **options):
    """(the page, its list of console messages, errors and requests to a network)."""
    page, complaints = browser.new_page(**options), []

    def on_request(request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            complaints.append(request.url)

    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", on_request)
    page.goto(path.as_uri())
    return page, complaints


@pytest.fixture
def page(runs, chromium):
    """The page of the run that sees, with three clips; it must complain of nothing."""
    page, complaints = opened(chromium, report(runs / "seeing", "dev", 3))
    yield page
    assert complaints == []


def test_sentences_are_searched_sorted_and_filtered(runs, page):
    visible = page.locator("#list > li:visible")
    assert visible.count() == CLIPS
    predictions = (runs / "seeing/predictions/dev.jsonl").read_text().splitlines()
    references = [json.loads(line)["reference"] for line in predictions]
    word = max(" ".join(references).split(), key=len)
    page.fill("#search", word.upper())
    assert visible.count() == sum(word in reference for reference in references) < CLIPS
    page.fill("#search", "")
    page.select_option("#sort", "-length")
    lengths = page.locator("#list > li").evaluate_all(
        "items => items.map((item) => Number(item.dataset.length))"
    )
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1
    page.check("#clips")
    assert visible.count() == 3


def test_a_clip_plays_and_a_word_seeks_to_its_peak(page):
    clip = page.locator("video:visible").first
    clip.evaluate("video => video.play()")
    page.wait_for_function("video => video.currentTime > 0", arg=clip.element_handle())
    clip.evaluate("video => video.pause()")
    word = page.locator(".attention button").last
    word.click()
    page.wait_for_function(
        """word => {
          const video = word.closest('li').querySelector('video');
          return Math.abs(video.currentTime / video.duration - word.dataset.at) < .05;
        }""",
        arg=word.element_handle(),
    )


def test_the_page_has_charts_scores_tables_and_what_differs_from_the_recipe(page):
    charts = page.locator(".chart")
    assert page.locator(".chart svg").count() == charts.count() >= 5
    assert page.get_by_role("img", name="Loss over the steps").is_visible()
    ids = page.locator("[id]").evaluate_all("elements => elements.map((e) => e.id)")
    assert len(ids) == len(set(ids))
    row = page.locator("#ablations tbody").inner_text()
    assert row.split("\t") == ["nothing", "3.00 [2.00, 4.00]"]
    picture = page.locator("#ablations img")
    decoded_width = "image => image.decode().then(() => image.naturalWidth)"
    assert picture.evaluate(decoded_width) > 100
    # By the recipe's name, because a manifest is of no known data set.
    published = page.locator("table", has_text="GFSLT-VLP").inner_text()
    assert published.index("this run") < published.index("FLa-LLM")
    text = page.locator("main").inner_text()
    assert f"{CLIPS} sentences were scored here, 642 there" in text
    assert "What differs from the recipe" in text
    differences = page.locator("table", has_text="this run").last.inner_text().split("\n")
    assert any(row.startswith("train.steps\t") and row.endswith("\t160") for row in differences)
    header = page.locator("header").inner_text()
    assert "100.00" in header and "from seeing" in header


PHONE = {"viewport": {"width": 360, "height": 740}}
DARK = {"color_scheme": "dark"}


@pytest.mark.parametrize("options", (PHONE, DARK), ids=("phone", "dark"))
def test_the_page_is_accessible_and_fits(runs, chromium, options):
    page, complaints = opened(chromium, report(runs / "seeing", "dev", 2), **options)
    page.evaluate("document.querySelectorAll('details').forEach((e) => e.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    colors = page.locator(".chart svg [style*='--accent']").evaluate_all(
        "lines => lines.map((e) => getComputedStyle(e).stroke)"
    )
    accent = "rgb(124, 192, 255)" if options is DARK else "rgb(11, 95, 165)"
    assert set(colors) == {accent}
    violations = Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in violations] == []
    assert complaints == []


def test_hostile_text_neither_runs_nor_breaks_the_page(runs, chromium, tmp_path):
    run = shutil.copytree(runs / "seeing", tmp_path / "run")
    rows = [
        {"key": f"{i}{text[:50]}", "reference": text or "x", "hypothesis": HOSTILE[i - 1]}
        for i, text in enumerate(HOSTILE)
    ]
    rows[-1]["hypothesis"] += " \u2028 x"  # a line break to Unicode, which JSON leaves as it is
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (run / "predictions/dev.jsonl").write_text(lines, "utf-8", "replace")
    (run / "command.txt").write_text(HOSTILE[0])
    bad_sample = json.dumps({"key": HOSTILE[0], "cause": HOSTILE[5]})
    (run / "bad_samples.jsonl").write_text(bad_sample + "\n{half a li")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 161, HOSTILE[5]: 1.0, HOSTILE[2]: 2.0}) + "\n")
    page, complaints = opened(chromium, report(run, "dev", 4))
    assert page.locator("#list > li").count() == len(HOSTILE)
    assert page.evaluate("window.broken") is None
    page.fill("#search", "onerror")
    assert page.locator("#list > li:visible").count() == 2
    assert page.locator("h2").first.is_visible()
    assert complaints == []


def test_the_page_of_a_run_that_failed_early_opens(runs, chromium, tmp_path):
    run = tmp_path / "runs/stage1/seed0"  # of flallm ablate
    run.mkdir(parents=True)
    shutil.copy(runs / "seeing/config.yaml", run)
    shutil.copy(runs / "table-9.md", tmp_path)
    page, complaints = opened(chromium, report(run, "test", 4))
    assert "flallm evaluate" in page.locator(".notes").inner_text()
    assert "what is frozen" in page.locator("#ablations").inner_text()
    assert complaints == []
