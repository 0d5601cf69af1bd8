"""The published numbers: complete, in range, with sources, and as consistent as the papers that printed them."""
import pandas as pd
import pytest

COLUMNS = ["method", "venue", "dataset", "setting", "category", "metric", "value", "source", "note"]
KEY = ["method", "dataset", "setting", "category", "metric"]
METRICS = ["image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro"]
CATEGORIES = {"mvtec_ad": 15, "visa": 12}

# cells that the source misprints: what it prints, and what its own column mean asks for
MISPRINTS = {("SimpleNet", "mvtec_ad", "capsule", "pixel_ap"): (5.4, 35.4),
             ("RD4AD", "visa", "macaroni1", "image_ap"): (1.5, 61.5),
             ("DeSTSeg", "visa", "capsules", "pixel_f1_max"): (9.1, 39.1)}
# columns whose printed mean is not the mean of the printed cells, for no single cell's sake
INCONSISTENT = {*(("RD4AD", "mvtec_ad", metric) for metric in ("pixel_ap", "pixel_f1_max")),
                *(("UniAD", "mvtec_ad", metric) for metric in ("pixel_auroc", "pixel_ap", "pixel_f1_max")),
                *(("UniAD", "visa", metric) for metric in METRICS)}


@pytest.fixture(scope="module")
def published(repository):
    return pd.read_csv(repository / "nbs/experiments/published.csv", keep_default_na=False).assign(
        value=lambda rows: pd.to_numeric(rows["value"].replace("", None)))


def number(published, method, dataset, metric, category="mean"):
    row = published.query("method == @method and dataset == @dataset and metric == @metric and category == @category")
    assert len(row) == 1
    return row["value"].item()


def test_columns_and_vocabulary(published):
    assert list(published.columns) == COLUMNS
    assert set(published["dataset"]) == {"mvtec_ad", "visa", "real_iad", "urbansound8k"}
    assert set(published["setting"]) == {"multi-class", "per-category"}
    assert set(published["metric"]) == set(METRICS)
    assert not published.duplicated(KEY).any()


def test_every_number_is_a_percentage_with_a_source(published):
    assert published["value"].dropna().between(0, 100).all()
    assert (published[["method", "venue", "category", "source"]] != "").all(axis=None)
    assert not published["source"].str.contains("/work|PAPERS", regex=True).any()


def test_what_could_not_be_obtained_is_empty_and_says_so(published):
    adiff = published[published["method"] == "ADiff"]
    assert set(adiff["dataset"]) == {"mvtec_ad", "urbansound8k"} and adiff["value"].isna().all()
    empty = published[published["value"].isna()]
    assert empty["note"].str.startswith("no number could be obtained").all()
    assert set(empty["method"]) == {"ADiff", "DeCo-Diff (release)", "DeCo-Diff (HEAD)"}
    assert set(empty[empty["method"] != "ADiff"]["dataset"]) == {"real_iad"}


@pytest.mark.parametrize("method, dataset, metric, value", [
    ("DeCo-Diff (release)", "mvtec_ad", "pixel_ap", 74.9),
    ("DeCo-Diff (HEAD)", "mvtec_ad", "pixel_ap", 76.8),
    ("DeCo-Diff (HEAD)", "visa", "aupro", 91.5),
    ("DeCo-Diff (independent run, released weights)", "visa", "pixel_ap", 52.9),
    ("WaDCD", "mvtec_ad", "pixel_ap", 77.4),
    ("INP-Former", "real_iad", "image_auroc", 90.5),
    ("DeSTSeg", "mvtec_ad", "pixel_ap", 54.3),
    ("DeSTSeg (ADer re-run)", "mvtec_ad", "pixel_ap", 75.8),
    ("PatchCore (ADer re-run)", "mvtec_ad", "aupro", 94.2),
    ("DDAD", "visa", "image_auroc", 98.9),
])
def test_means(published, method, dataset, metric, value):
    assert number(published, method, dataset, metric) == value


def test_categories(published):
    assert number(published, "MambaAD", "mvtec_ad", "pixel_ap", "bottle") == 79.7
    assert number(published, "DiAD", "visa", "image_f1_max", "pipe_fryum") == 93.7
    assert number(published, "DDAD", "mvtec_ad", "aupro", "wood") == 82.9
    columns = published[published["category"] != "mean"].groupby(["method", "dataset", "setting", "metric"],
                                                                 as_index=False).size()
    assert (columns["size"] == columns["dataset"].map(CATEGORIES)).all()
    assert len(columns) == 6 * 2 * 7 + 1 * 2 * 3


def test_categories_average_to_the_printed_mean_but_where_the_source_does_not(published):
    cells = published[published["category"] != "mean"].copy()
    for (method, dataset, category, metric), (printed, meant) in MISPRINTS.items():  # noqa: B007  the query names them
        here = cells.eval("method == @method and dataset == @dataset and category == @category and metric == @metric")
        assert cells.loc[here, "value"].tolist() == [printed]
        assert f"must be {meant}" in cells.loc[here, "note"].item()
        cells.loc[here, "value"] = meant
    column = ["method", "dataset", "setting", "metric"]
    both = cells.groupby(column)["value"].mean().to_frame("cells").join(
        published[published["category"] == "mean"].set_index(column)[["value", "note"]], how="left")
    off = both[(both["cells"] - both["value"]).abs() > 0.1 + 1e-9]
    assert both["value"].notna().all()
    assert {(method, dataset, metric) for method, dataset, _, metric in off.index} == INCONSISTENT
    assert off["note"].str.contains("cells").all()
