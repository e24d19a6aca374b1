"""What the page works out itself: nearest texts, differences, times, charts, published scores."""

import random
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from flallm import config as cfg
from flallm.evaluation import metrics
from flallm.report import charts as report_charts
from flallm.report import run_files, sentences

SVG_PATH = "{http://www.w3.org/2000/svg}path"


def test_the_nearest_training_text_shares_most_words():
    nearest = sentences.Nearest(
        [
            "am samstag regnet es im süden",
            "heute nacht regnet es",
            "am samstag schneit es im norden",
            "und nun das wetter",
        ]
    )
    assert nearest("am samstag regnet es im norden länger") == "am samstag regnet es im süden"
    assert nearest("ganz anders") == ""


def test_words_that_only_one_text_has_are_marked():
    missed, wrong = sentences.word_differences(["a", "b", "c"], ["a", "x", "c", "d"], " ")
    assert missed == [("a", False), (" ", False), ("b", True), (" ", False), ("c", False)]
    assert [part for part, differs in wrong if differs] == ["x", "d"]


def test_the_time_of_a_run_is_split_by_use():
    """Of 30 seconds 5 are on dev; of the others first a quarter is waiting, then nothing."""
    rows = [
        {"dev_seconds": 5.0},
        {"seconds": 25.0, "data_wait_share": 0.25},
        {"seconds": 30.0, "data_wait_share": 0.0},
    ]
    times = [("training steps", 20.0), ("waiting for data", 5.0), ("dev scores", 5.0)]
    assert run_files.time_by_use(rows) == times
    (waiting,) = report_charts.charts([{"step": 7, "data_wait_share": 0.25}])
    assert (waiting.unit, waiting.steps, waiting.series[0].values) == ("%", [7], [25.0])


def test_a_run_of_an_unknown_recipe_has_no_differences_from_it():
    recipe = cfg.flat(yaml.safe_load(cfg.dump(cfg.load("demo", "stage1"))))
    assert run_files.recipe_differences(recipe) == {}
    changed = recipe | {"train.steps": 7, "new": 1}
    differences = {"train.steps": recipe["train.steps"], "new": "(not there)"}
    assert run_files.recipe_differences(changed) == differences
    assert run_files.recipe_differences(recipe | {"name": "../demo"}) is None
    assert run_files.recipe_differences(recipe | {"name": "mine"}) is None


def curves(chart):
    """The points (x, y) of each line of a chart, in the SVG's coordinates: y grows downwards."""
    colors = [f"stroke: var({name})" for name in ("--accent", "--other", "--third")]
    lines = []
    for path in ElementTree.fromstring(report_charts.draw(chart)).iter(SVG_PATH):
        style = path.get("style", "")
        if any(color in style for color in colors):
            points = re.findall(r"[ML] (\S+) (\S+)", path.get("d"))
            lines.append([(float(x), float(y)) for x, y in points])
    return lines


def test_a_chart_draws_its_values():
    rows = [
        {"step": step, "lr_encoder": 0.0, "lr_adapter": 1e-4 * step, "lr_language": 2e-4 * step}
        for step in range(1, 101)
    ]
    del rows[50]["lr_adapter"]
    (chart,) = report_charts.charts(rows)
    adapter, language = curves(chart)[:2]  # the legend's lines come after them
    labels = [series.label for series in chart.series]
    assert labels == ["adapter", "language model"]  # the encoder does not train
    assert adapter[0][1] > adapter[-1][1] > language[-1][1]
    adapter_rise, language_rise = (line[0][1] - line[-1][1] for line in (adapter, language))
    assert adapter_rise == pytest.approx(language_rise / 2, rel=1e-3)
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


PUBLISHED = {  # FLa-LLM's ROUGE-L and BLEU-1 to 4, as the results section of the paper gives them
    "phoenix14t": [45.27, 46.29, 35.33, 28.03, 23.09],
    "csl-daily": [37.25, 37.13, 25.12, 18.38, 14.20],
    "how2sign": [27.81, 29.81, 18.99, 13.27, 9.66],
}
# The table's line of gains over the best system without gloss (BLEU-4, ROUGE-L), and the numbers
# of systems with and without gloss.
GAINS = {"phoenix14t": (1.65, 2.78), "csl-daily": (3.20, 0.81), "how2sign": (1.63, 15.20)}
NUM_SYSTEMS = {"phoenix14t": (5, 8), "csl-daily": (4, 5), "how2sign": (0, 4)}


def test_published_tables_agree_with_the_paper():
    text = (Path(run_files.__file__).parent / "published.yaml").read_text()
    tables = yaml.safe_load(text)
    assert tables.keys() == PUBLISHED.keys()
    for name, table in tables.items():
        gloss_free = [system for system in table["systems"] if not system["gloss"]]
        num_gloss = len(table["systems"]) - len(gloss_free)
        assert (num_gloss, len(gloss_free)) == NUM_SYSTEMS[name]
        *others, fla_llm = gloss_free
        assert fla_llm["name"] == "FLa-LLM"
        scores = [fla_llm[score] for score in ("rouge_l", "bleu1", "bleu2", "bleu3", "bleu4")]
        assert scores == PUBLISHED[name]
        bleu4_gain, rouge_l_gain = GAINS[name]
        best_bleu4 = max(system["bleu4"] for system in others)
        assert fla_llm["bleu4"] - best_bleu4 == pytest.approx(bleu4_gain)
        # CSL-Daily's gains are over GFSLT-VLP, its last row: the best in most columns.
        rouge_l = [system["rouge_l"] for system in others if system["rouge_l"]]
        assert fla_llm["rouge_l"] - rouge_l[-1] == pytest.approx(rouge_l_gain)
        assert table["convention"] in metrics.CONVENTIONS
        assert table["split"] == "test"
