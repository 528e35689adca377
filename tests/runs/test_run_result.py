"""What Python gets of a run: figures as tables, predictions as it was scored on, a model as PEFT has it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import Instructions, Refused, Rows, Run, RunResult, open_result, prepare, run
from fedloom.core.events import Command, Event
from tests.support.fake_runs import write_run
from tests.support.folder_runs import stop_at
from tests.support.same_bytes import COMPARED
from tests.support.tiny_models import tiny_run, toy_answers, toy_rows

TESTED = Rows(toy_rows(240)).load(seed=5).test


@pytest.fixture(scope="module")
def result(finished: Path) -> RunResult:
    return open_result(str(finished))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in every if line["kind"] == kind]


def test_predictions_are_as_good_as_the_last_score_says(result: RunResult) -> None:
    texts = list(TESTED.texts)
    found = result.predict(texts)
    right = sum(TESTED.names[label] == name for label, name in zip(TESTED.labels, found, strict=True))
    assert right / len(texts) == result.scores[-1]["accuracy"]
    shares = result.predict_proba(texts)
    assert list(shares.columns) == ["colour", "pet"]
    assert shares.sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-6)
    assert shares.idxmax(axis=1).tolist() == found
    loss = -torch.tensor(
        [row[TESTED.names[y]] for row, y in zip(shares.to_dict("records"), TESTED.labels, strict=True)]
    )
    assert float(loss.neg().log().neg().mean()) == pytest.approx(result.scores[-1]["loss"], rel=1e-5)
    assert result.predict(texts[3]) == found[3:4]
    assert result.predict([]) == []


def test_the_model_is_pefts_has_one_adapter_and_the_names_of_the_labels(result: RunResult) -> None:
    model, tokenizer = result.model().eval(), result.tokenizer()
    assert len(model.peft_config) == 1
    assert model.config.id2label == {0: "colour", 1: "pet"}
    with torch.no_grad():
        logits = model(**tokenizer([TESTED.texts[0]], return_tensors="pt")).logits
    assert logits.softmax(1)[0].tolist() == pytest.approx(result.predict_proba(TESTED.texts[0]).iloc[0].tolist())
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert result.predict(list(TESTED.texts[:9])) == open_result(result.folder).predict(list(TESTED.texts[:9]))


def test_metrics_and_clients_have_a_row_each_and_the_figures_of_the_log(result: RunResult, finished: Path) -> None:
    metrics, clients = result.metrics, result.clients
    assert metrics["version"].tolist() == [0, 1, 2, 3]
    scores, versions = lines(finished, "score"), lines(finished, "version")
    for name in ("accuracy", "loss", "time"):
        assert metrics[name].tolist() == [line[name] for line in scores]
    assert metrics["train_loss"].tolist()[1:] == [line["loss"] for line in versions]
    assert metrics["bytes_up"].tolist()[1:] == [line["bytes_up"] for line in versions]
    assert clients["client"].tolist() == [f"c{k:02d}" for k in range(6)]
    assert clients["accuracy"].tolist() == [line["accuracy"] for line in lines(finished, "client")]
    assert clients["tasks"].sum() == 12
    assert clients["bytes_up"].sum() == versions[-1]["bytes_up"]
    about = json.loads((finished / "manifest.json").read_text(encoding="utf-8"))["partition"]["clients"]
    assert clients["examples"].tolist() == [about[client]["examples"] for client in clients["client"]]


def test_without_pandas_tables_are_lists_of_mappings(result: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, shares = result.metrics.to_dict("records"), result.predict_proba(TESTED.texts[0])
    monkeypatch.setattr("fedloom.runs.run_result.find_spec", lambda name: None)
    assert [row["accuracy"] for row in result.metrics] == [row["accuracy"] for row in metrics]
    assert [row["client"] for row in result.clients] == [f"c{k:02d}" for k in range(6)]
    assert result.predict_proba(TESTED.texts[0]) == shares.to_dict("records")


def test_a_result_shows_its_state_and_score_and_no_tensor(result: RunResult, finished: Path) -> None:
    accuracy = f"accuracy {100 * result.scores[-1]['accuracy']:.1f} % (majority 50.0 %)"
    assert repr(result).startswith(f"RunResult({str(finished)!r}: finished, 3 rounds, {accuracy}, ")
    assert len(repr(result)) < 100 + len(str(finished))
    assert "always answering" in result._repr_html_()
    assert result.report == finished / "report.html"
    assert repr(RunResult(Path("gone"), ())) == "RunResult('gone')"


def test_what_the_model_cannot_do_is_refused_with_what_it_can(result: RunResult) -> None:
    with pytest.raises(Refused, match="chooses labels; use predict"):
        result.generate("a cat")
    with pytest.raises(Refused, match="trained on single texts"):
        result.predict([("a cat", "a dog")])
    with pytest.raises(Refused, match="give texts only, or pairs"):
        result.predict([("a cat", "a dog"), "a cat"])  # type: ignore[list-item]
    with pytest.raises(Refused, match="give texts only, or pairs"):
        result.predict([3])  # type: ignore[list-item]
    with pytest.raises(Refused, match="give one column of it"):
        result.predict(result.clients)
    with pytest.raises(Refused, match=r"client = 'c1': did you mean c01\? the run scored c00"):
        result.export(client="c1")
    with pytest.raises(Refused, match="name a folder that a run has written"):
        open_result("nowhere")


def test_the_folder_of_a_deployment_and_a_path_where_a_text_is_expected_are_understood(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "server" / "run")
    assert open_result(tmp_path / "server") == open_result(str(folder))
    given = tiny_run(tmp_path, start=folder)
    assert (given.model, given.start) == (str(tmp_path), str(folder))


def test_data_without_a_source_are_refused_with_the_source_that_takes_them_and_are_not_shown(result: RunResult) -> None:
    for data, shown, remedy in (
        ("notes.csv", "'notes.csv'", "Table(PATH"),
        (Path("notes.csv"), "'notes.csv'", "Table(PATH"),
        (toy_rows(3), "'a list'", "Rows(DATA"),
        (result.clients, "'a DataFrame'", "Rows(DATA"),
    ):
        with pytest.raises(Refused) as refused:
            Run("m", data)  # type: ignore[arg-type]
        assert str(refused.value).startswith(f"data = {shown}: ")
        assert remedy in str(refused.value)


@pytest.mark.slow
def test_a_run_that_is_stopped_says_how_it_goes_on_and_ends_in_the_same_bytes(
    finished: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All paths as texts, and an observer that is told of each step."""
    value, out, steps = tiny_run(encoder, name="finished", seed=5), str(tmp_path / "out"), list[float]()

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        steps.append(now)

    with pytest.raises(KeyboardInterrupt) as stop:
        run(value, out, observers=[observe, stop_at(KeyboardInterrupt, 2)])
    assert f"fedloom.run(run, resume={out!r})" in stop.value.__notes__[0]
    assert "ProductDelta" in capsys.readouterr().err
    assert "interrupted" in repr(open_result(out))
    result = run(value, resume=out, progress=False)
    assert capsys.readouterr().err == ""
    assert steps
    for name in COMPARED:
        assert (result.folder / name).read_bytes() == (finished / name).read_bytes(), name
    again = open_result(out)
    assert again == result
    for name, factor in result.adapter.factors.items():
        read = again.adapter.factors[name]
        assert torch.allclose(read.up @ read.down, factor.up @ factor.down, atol=1e-6)
    with pytest.raises(Refused, match="exists already"):
        run(value, out)


@pytest.mark.slow
def test_a_model_that_writes_answers_as_in_its_samples(generator: Path, tmp_path: Path) -> None:
    """A text, a pair and a conversation; the samples are those of the run's own end."""
    rows = toy_answers(240)
    result = run(tiny_run(generator, data=Instructions(rows), held_out=0.0), tmp_path / "out", progress=False)
    samples = lines(result.folder, "sample")
    assert result.generate([line["request"] for line in samples]) == [line["after"] for line in samples]
    alone = result.generate(rows[0]["instruction"], 5)
    talk = [{"role": "user", "content": rows[0]["instruction"]}]
    assert result.generate([(rows[0]["instruction"], ""), talk], 5) == alone * 2
    longer = [*talk, {"role": "assistant", "content": "green"}, *talk]
    assert len(result.generate([longer, longer])) == 2
    assert result.generate([]) == []
    for bad in ([3], [[{"role": "assistant", "content": "x"}]], [[{"content": "x"}]], [[]]):
        with pytest.raises(Refused, match="prompts"):
            result.generate(bad)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="writes text; use generate"):
        result.predict("a cat")
    with pytest.raises(Refused, match="at least 1 token"):
        result.generate("a cat", 0)


def test_a_job_shows_its_clients_and_none_of_their_texts(encoder: Path) -> None:
    rows = toy_rows(60)
    job = prepare(tiny_run(encoder, data=Rows(rows)))
    assert repr(job) == "PreparedRun('run': 6 clients, 48 training and 12 test examples)"
    shown = job._repr_html_()
    assert [client for client in job.profiles if f">{client}</td>" in shown] == [f"c{k:02d}" for k in range(6)]
    assert not any(row["text"] in shown for row in rows)
    assert job.clients[["label colour", "label pet"]].sum().sum() == job.clients[["examples", "held_out"]].sum().sum()
    assert job.clients["client"].tolist() == [*job.profiles]


@pytest.mark.slow
def test_the_report_is_written_where_there_is_none(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "report.html").unlink()
    page = open_result(folder).report
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
