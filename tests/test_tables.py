"""Run folders to tables: what counts as a result, what is averaged, what stands beneath, and text that stays text."""
import json
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from adiff.core import InputError, read_json, write_json
from adiff.data.demo_images import make_demo_data
from adiff.data.demo_sounds import make_demo_sounds
from adiff.lab import tables
from adiff.runs import evaluate as evaluation
from adiff.runs.each_category import run_each
from adiff.runs.evaluate import evaluate
from adiff.runs.fit import fit
from adiff.scores.metrics import METRIC_NAMES, image_metrics
from adiff.scores.pixel_counts import PixelCounts, counted_metrics

pytestmark = pytest.mark.slow

MOMENT = {"data": {"image_size": 32}, "training": {"length": 2, "batch_size": 2, "augmentations": []}}


def add_run(out, label, axes, done=True):
    "Lists a run in matrix.json and writes what `adiff reproduce` would beside it."
    about = read_json(out / "matrix.json") if (out / "matrix.json").exists() else {"matrix": "tiny", "description": "",
                                                                                   "command": "",
                                                                                   "runs": []}
    identity = f"{len(about['runs']):08x}" * 2
    run = {"label": label, "folder": f"runs/{label}-{identity[:8]}", "identity": identity, "axes": axes, "group": "all"}
    folder = out / run["folder"]
    write_json(out / "matrix.json", {**about, "runs": [*about["runs"], run]})
    write_json(folder / "run.json", {**run, "matrix": "tiny", "notebook": "", "parameters": {}})
    (folder / "notebook.ipynb").write_text("{}")
    if done:
        write_json(folder / "done.json", {"identity": identity, "seconds": 1.0, "finished": ""})
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    "Drawing takes longer than everything that is tested here."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "draw_figures", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory, one_thread, no_figures):
    "Two seeds of one model for two categories, one model per category, sounds, and a run that did not finish."
    out = tmp_path_factory.mktemp("reproduction") / "out"
    images = make_demo_data(out / "data/demo & <b>", categories=("brick", "cup"), train=6, good=4, per_defect=1)
    sounds = make_demo_sounds(out / "data/pumps", train=6, good=4, per_fault=1)
    for seed in (0, 1):
        folder = add_run(out, f"deco-seed{seed}", {"method": "deco", "part": "no_thing & 50%", "seed": str(seed)})
        fit("deco", images, folder, seed=seed, device="cpu", overrides=MOMENT)
        evaluate(folder, device="cpu")
    run_each("knn", images, add_run(out, "knn", {"method": "knn", "categories": "all"}), device="cpu",
             overrides={"discrepancy": {"memory_size": 100}})
    run_each("one-class-svm", sounds, add_run(out, "svm", {"method": "one-class-svm"}), device="cpu")
    add_run(out, "killed", {"method": "deco"}, done=False)
    return out


@pytest.fixture(scope="module")
def tidy(out):
    return tables.collect(out)


def test_what_evaluation_leaves_behind(out):
    folder = out / "runs/deco-seed0-00000000"
    found = read_json(folder / "metrics.json")
    assert found["network_calls"] == 1 and read_json(out / "runs/knn-00000002/metrics.json")["network_calls"] == 0
    scores = pd.read_csv(folder / "scores.csv")
    for category in ("brick", "cup"):
        with np.load(folder / f"pixels/{category}.npz") as file:
            counts = PixelCounts(**file)
        for name, value in counted_metrics(counts).items():
            assert value == pytest.approx(found["categories"][category][name], abs=1e-3)
        own = scores[scores.category == category]
        assert ((counts.regions > 0) == (own.label == 1)).all()
        with (np.load(folder / f"examples/{category}.npz") as ours,
              np.load(out / f"runs/knn-00000002/{category}/examples/{category}.npz") as theirs):
            assert list(ours["path"]) == list(theirs["path"])
            assert (ours["picture"] == theirs["picture"]).all() and (ours["mask"] == theirs["mask"]).all()
            assert "reconstruction" in ours and "reconstruction" not in theirs
            assert ours["reconstruction"].shape == ours["picture"].shape
            assert list(ours["label"]) == [0] + [1] * (len(ours["label"]) - 1)
            assert len(set(ours["defect"])) == len(ours["defect"]) <= 6
            assert dict(zip(own.path, own.score.astype("f4")))[str(ours["path"][1])] == pytest.approx(ours["score"][1])
    (sound,) = (out / "runs/svm-00000003").rglob("examples/*.npz")
    with np.load(sound) as file:
        assert not file["known"].any() and file["picture"].dtype == np.uint8 and file["map"].dtype == np.float16
    assert not list((out / "runs/svm-00000003").rglob("pixels/*"))


def test_evaluating_again_replaces_what_an_earlier_evaluation_left(out):
    folder = out / "runs/deco-seed0-00000000"
    before, stale = read_json(folder / "metrics.json"), folder / "pixels/gone.npz"
    counts = (folder / "pixels/cup.npz").read_bytes()
    stale.write_bytes(b"")
    again = evaluate(folder, device="cpu")
    assert not stale.exists() and (folder / "pixels/cup.npz").read_bytes() == counts
    assert again["categories"] == before["categories"]


def test_tidy_data(out, tidy):
    leaves = tidy.drop_duplicates(["folder", "category"])
    sounds = len(leaves[leaves.run == "svm"])
    assert list(leaves.run) == ["deco-seed0"] * 2 + ["deco-seed1"] * 2 + ["knn"] * 2 + ["svm"] * sounds
    assert list(tidy.variant.unique()) == ["deco, no_thing & 50%", "knn", "one-class-svm"]
    assert set(tidy.setting[tidy.method == "deco"]) == {"multi-class"}
    assert set(tidy.setting[tidy.method == "knn"]) == {"per-category"}
    assert set(tidy.part.dropna()) == {"no_thing & 50%"} and "aupro" not in set(tidy.metric[tidy.kind == "sound"])
    assert (tidy.notebook.map(lambda path: path.endswith("/notebook.ipynb"))).all()
    found = read_json(out / "runs/deco-seed1-00000001/metrics.json")["categories"]["cup"]
    for row in tidy[(tidy.run == "deco-seed1") & (tidy.category == "cup")].itertuples():
        assert row.value == found[row.metric] and row.low <= row.high and row.n_test == found["n_test"]


def test_any_folder_of_runs_is_collected(out, tidy):
    everywhere = tables.collect([out / "runs", out / "runs/knn-00000002/cup"])
    assert set(everywhere.folder) == set(tidy.folder) and set(everywhere.variant) == set(tidy.variant)
    bare = tables.collect(out / "runs/knn-00000002/cup")
    assert set(bare.category) == {"cup"} and bare.notebook.iloc[0].endswith("knn-00000002/notebook.ipynb")
    with pytest.raises(InputError, match="no evaluated run"):
        tables.collect(out / "data")


def test_a_matrix_counts_only_what_it_lists_and_what_is_done(out, tmp_path):
    write_json(tmp_path / "matrix.json", {**read_json(out / "matrix.json"),
                                          "runs": read_json(out / "matrix.json")["runs"][-1:]})
    with pytest.raises(InputError, match="none of its 1 runs has metrics"):
        tables.collect(tmp_path)


def synthetic_run(folder, seed=0, method="deco", categories=("a", "b"), shift=1.0, overrides=None, dataset="mvtec_ad",
                  kind="image",
                  notes=(), **one):
    "A run folder with scores drawn at random, without a model."
    rng, rows, found = np.random.default_rng([seed, len(str(folder))]), [], {}
    for category in categories:
        labels = np.repeat([0, 1], 20)
        scores = rng.normal(shift * labels)
        rows.append(pd.DataFrame({"path": "", "category": category, "label": labels, "defect": "", "score": scores}))
        image = image_metrics(labels, scores)
        found[category] = {**image, **dict.fromkeys(METRIC_NAMES[3:]), "n_train": 10, "n_test": 40, **one}
        del found[category]["notes"]
    write_json(folder / "config.json", {"dataset": {"categories": list(categories)}})
    write_json(folder / "metrics.json",
               {"method": method, "dataset": dataset, "kind": kind, "preset": "cpu", "seed": seed, "categories": found,
                                         "train_seconds": 1.0, "seconds_per_image": 0.1, "parameters": 5,
                "peak_memory_mb": 1.0,
                                         "notes": list(notes)})
    pd.concat(rows).to_csv(folder / "scores.csv", index=False)
    return folder


def test_means_and_intervals(tmp_path):
    for seed in range(3):
        synthetic_run(tmp_path / f"seed{seed}", seed)
    tidy = tables.collect(tmp_path)
    row = tables.summarize(tidy, ["image_auroc"]).iloc[0]
    seeds = tidy[tidy.metric == "image_auroc"].groupby("seed").value.mean()
    assert (row["mean"], row["std"], row.seeds, row.categories) == (pytest.approx(seeds.mean()),
                                                                    pytest.approx(seeds.std()), 3, 2)
    single = tidy[tidy.metric == "image_auroc"]
    assert row.low < row["mean"] < row.high and row.high - row.low < (single.high - single.low).mean()
    harmonic = tables.summarize(tidy, ["image_auroc"], "harmonic mean").iloc[0]
    assert harmonic["mean"] < row["mean"]
    one = tables.summarize(tidy[(tidy.seed == 0) & (tidy.category == "a")], ["image_auroc"]).iloc[0]
    cell = single[(single.seed == 0) & (single.category == "a")].iloc[0]
    assert (one["mean"], one.low, one.high) == (cell.value, cell.low, cell.high) and np.isnan(one["std"])


def test_without_pixel_counts_there_is_a_value_but_no_interval(tmp_path):
    leaf = synthetic_run(tmp_path / "run", categories=("a",), pixel_auroc=0.9, pixel_ap=0.5, pixel_f1_max=0.5,
                         aupro=0.7)
    overview = tables.tables(tables.collect(leaf))[0].cells.iloc[0]
    assert overview["AUPRO"] == "70.0" and overview["image AUROC"].endswith("]")
    assert overview["network calls"] == "not available"


def test_an_interval_is_that_of_resampled_files(tmp_path):
    leaf = synthetic_run(tmp_path / "run", categories=("a",))
    found = tables.collect(leaf).set_index("metric").loc["image_auroc"]
    scores, rng, drawn = pd.read_csv(leaf / "scores.csv"), np.random.default_rng(1), []
    normal, anomalous = (scores.score[scores.label == label].to_numpy() for label in (0, 1))
    for _ in range(2000):
        drawn.append((rng.choice(anomalous, 20)[:, None] > rng.choice(normal, 20)).mean())
    assert [found.low, found.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.02)


def test_runs_that_nothing_tells_apart_are_not_averaged(tmp_path):
    for name in ("long", "short"):
        synthetic_run(tmp_path / name)
    assert list(tables.collect(tmp_path).variant.unique()) == ["deco (long)", "deco (short)"]


def test_overview_and_categories(out, tidy):
    made = {table.title: table for table in tables.tables(tidy, tables.read_published())}
    overview = made["demo & <b>, multi-class: all variants"]
    assert list(overview.cells.columns[:2]) == ["image AUROC", "image AP"] and "±" in overview.cells.iloc[0, 0]
    assert "[" in overview.cells.iloc[0, 0]
    assert overview.links.iloc[0, 0] == str(out / "runs/deco-seed0-00000000/notebook.ipynb")
    assert set(overview.runs) == {"deco-seed0", "deco-seed1"}
    assert any("protocol official" in note for note in overview.notes) and sum("held-out" in note
                                                                               for note in overview.notes) == 1
    assert overview.cells.loc["deco, no_thing & 50%", "network calls"] == "1"
    rows = made["demo & <b>, per-category: AUPRO by category"]
    assert list(rows.cells.index) == ["brick", "cup", "mean"] and "±" not in rows.cells.iloc[0, 0]
    (sounds,) = (table for title, table in made.items() if title == "pumps, per-category: all variants")
    assert "clip pAUC" in sounds.cells and not any("pixel" in name or "image" in name for name in sounds.cells)
    assert not any("mean over 0 of" in note for table in made.values() for note in table.notes)


def test_notes_say_of_what_they_hold(tmp_path):
    synthetic_run(tmp_path / "a", notes=["protocol x", "a: odd", "b: odd",
                                         "aupro: mean over 0 of 2 categories, undefined in a, b"])
    synthetic_run(tmp_path / "b", method="adiff", notes=["protocol x", "the codec sees 32 pixels"])
    overview = tables.tables(tables.collect(tmp_path))[0]
    assert overview.notes[-3:] == ["protocol x", "a, b: odd (deco)", "the codec sees 32 pixels (adiff)"]


def test_harmonic_means_of_sounds(tmp_path):
    synthetic_run(tmp_path / "run", kind="sound", dataset="machines")
    overview = tables.tables(tables.collect(tmp_path))[0].cells
    assert list(overview)[:6] == ["clip AUROC", "clip AP", "clip F1-max", "clip pAUC", "clip AUROC, harmonic mean",
                                  "clip pAUC, harmonic mean"]


def published(rows):
    return pd.DataFrame(rows, columns=["method", "category", "value"]).assign(
        venue="V", dataset="mvtec_ad", setting="multi-class", metric="image_auroc", source="S", note="")


def test_ours_against_published(tmp_path):
    synthetic_run(tmp_path / "run", dataset="MVTec-AD", categories=("bottle", "cable"))
    tidy = tables.collect(tmp_path)
    theirs = published([("Rival", "bottle", 70.0), ("Rival", "cable", 60.0), ("Rival", "mean", 99.0),
                        ("DeCo-Diff (x)", "mean", 98.0),
                        ("ADiff", "mean", np.nan), ("DeCo-Difference", "mean", 50.0)])
    mean, by_category = tables.tables(tidy, theirs)[-2:]
    assert list(mean.cells.index) == ["deco (ours)", "DeCo-Diff (x)", "Rival", "ADiff", "DeCo-Difference"]
    ours = 100 * tidy[tidy.metric == "image_auroc"].value.mean()
    shown = mean.cells[["image AUROC", "image AUROC gap"]].to_numpy().tolist()
    assert shown[1:4] == [["98.0 (all)", "not available"], ["65.0", f"{ours - 65:+.1f}"],
                          ["not available", "not available"]]
    assert by_category.cells.loc["mean", "Rival"] == "65.0"
    assert by_category.cells.loc["bottle", "DeCo-Diff (x)"] == "not available"
    assert any("Rival, V: S" == note for note in by_category.notes)


def test_printed_means_count_for_a_whole_dataset(tmp_path):
    theirs = tables.read_published()
    names = sorted(set(theirs.category[theirs.dataset == "visa"]) - {"mean"})
    synthetic_run(tmp_path / "run", dataset="visa", categories=names)
    tidy = tables.collect(tmp_path)
    made = tables.tables(tidy, theirs)
    (mean,) = (table.cells for table in made if table.title.endswith("against published numbers"))
    printed = theirs.query("dataset == 'visa' and method == 'DeCo-Diff (HEAD)' and category == 'mean' and metric "
                           "== 'image_auroc'").value.iloc[0]
    ours = 100 * tidy[tidy.metric == "image_auroc"].value.mean()
    assert mean.loc["DeCo-Diff (HEAD)", ["image AUROC", "image AUROC gap"]].tolist() == [f"{printed:.1f}",
                                                                                         f"{ours - printed:+.1f}"]


def test_published_numbers_are_found_or_asked_for(tmp_path):
    assert {"mvtec_ad", "visa"} <= set(tables.read_published().dataset)
    with pytest.raises(InputError, match="no such file"):
        tables.read_published(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("method,value\nx,1\n")
    with pytest.raises(InputError, match="has no column category"):
        tables.read_published(tmp_path / "bad.csv")


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [value for name, value in attributes if name == "href"]


def test_written_tables(out, tidy):
    folder = out / "tables"
    folder.mkdir()
    (folder / "99-gone.html").write_text("old")
    (folder / "mine.html").write_text("kept")
    paths = tables.write_tables([out], folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} | {"mine.html"}
    assert len(paths) == 2 + 3 * len(tables.tables(tidy, tables.read_published()))
    for path in paths:
        if path.suffix == ".html":
            page = Links(path.read_text())
            assert page.found and "b" not in page.tags and all((folder / unquote(link)).is_file()
                                                               for link in page.found)
        if path.suffix in (".md", ".tex"):
            assert str(out) not in path.read_text()
    tex = next(path for path in paths if path.suffix == ".tex").read_text()
    assert r"demo \& \textless{}b\textgreater{}" in tex and r"no\_thing \& 50\%" in tex and r"$\pm$" in tex
    assert tex.count("{") == tex.count("}") and tex.count(r"\begin") == tex.count(r"\end")
    body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0].replace(r"\&", "").strip().splitlines()
    columns = tex.split(r"\begin{tabular}{")[1].split("}")[0]
    assert all(line.count("&") == len(columns) - 1 and line.endswith(r"\\") for line in body)
    csv, parquet = pd.read_csv(paths[0]), pd.read_parquet(paths[1])
    assert len(csv) == len(parquet) == len(tidy) and str(out) not in paths[0].read_text()
    assert (folder / csv.folder[0] / "metrics.json").is_file()
    before = {path: path.read_bytes() for path in paths}
    assert tables.write_tables([out], folder) == paths and before == {path: path.read_bytes() for path in paths}


def test_markdown_stays_a_table(tidy):
    text = tables.tables(tidy)[0].markdown()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.replace(r"\|", "").count("|")
                for line in lines}) == 1 and "<b>" not in text and r"no\_thing" in text


def test_tables_are_quick_to_import():
    code = ("import sys, adiff.lab.tables, adiff.scores.metrics; "
            "print(json.dumps([name for name in ('torch', 'matplotlib', 'diffusers') if name in sys.modules]))")
    printed = subprocess.run([sys.executable, "-c", f"import json\n{code}"], capture_output=True, text=True,
                             check=True).stdout
    assert json.loads(printed) == []
