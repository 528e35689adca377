"""Run files in TOML: the same runs as in Python, nothing executed, every mistake told with its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    ACE,
    Availability,
    BySpeed,
    Canary,
    DepthByMemory,
    FedBuff,
    FedIT,
    FixedRank,
    HalfChange,
    Hierarchy,
    Instructions,
    LengthDirichlet,
    Limits,
    LoRA,
    Momentum,
    Plan,
    Private,
    RandomRank,
    Refused,
    Rounds,
    Run,
    Table,
    Tickets,
    Tier,
    Training,
    World,
    by_tokens,
    cosine,
    words,
)
from fedloom.core.schema import jsonable
from fedloom.runs.run_file import load_run_file
from fedloom.runs.toml_run import parse_run

RUNS = [
    Run("m", Table("a.csv", text=("title", "body"), labels={"0": "no", "1": "yes"}, missing="drop"), date="2026-01-31"),
    Run("m", Tickets(clients=3), aggregator=Momentum(FedIT()), schedule=FedBuff(3, weigh=by_tokens), transfer=None),
    Run("m", Instructions("a.json", roles={"patient": "user"}), plan=Plan(RandomRank(1, 4), 3, DepthByMemory())),
    Run("m", Tickets(), world=World((Tier("slow", 1, 1e9, 1e6, 1e6, 1e9),)), availability=Availability(), engine=None),
    Run("m", Tickets(), hierarchy=Hierarchy(BySpeed(2), rounds=3), lora=LoRA(target_modules=("query",)), threads=2),
    Run("m", Tickets(), privacy=Private(1.0, 1.0, 3, budget=(3.0, 1e-5)), canary=Canary(20), limits=Limits(4, seconds=60)),
    Run("m", Tickets(), partition=LengthDirichlet(measure=words), training=Training(decay=cosine), device="cuda:1"),
    Run("m", Tickets(), aggregator=ACE(), schedule=Rounds(2, deadline=3.0), held_out=0.0, test_limit=5, transfer=HalfChange()),
]  # fmt: skip
BASE = 'model = "m"\ndata = "Tickets"\n'


def toml(value: Any) -> str:
    """Write JSON data as an inline value of TOML, which has no null: what is off by default is left out, by its name else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return '"None"' if value is None else json.dumps(value)


@pytest.mark.parametrize("run", RUNS)
def test_the_settings_in_a_manifest_are_a_run_file(run: Run, tmp_path: Path) -> None:
    """Every field of every class, as the manifest writes it: the file gives the same run, of the same types."""
    file = tmp_path / "mine.toml"
    settings = jsonable(run)
    file.write_text("\n".join(f"{name} = {toml(value)}" for name, value in settings.items()), encoding="utf-8-sig")
    again = load_run_file(file)
    assert again == run
    assert repr(again) == repr(run)
    assert jsonable(again) == settings


def test_a_table_changes_the_default_and_one_with_a_type_names_the_class() -> None:
    run = parse_run(
        f'{BASE}date = 2026-01-31\n[plan]\nlocal_steps = 3\n[schedule]\ncohort_size = 2\n[aggregator]\ntype = "FedIT"\n'
    )
    default = Run("m", Tickets())
    assert run.plan == Plan(default.plan.rank, 3)
    assert (run.schedule, run.aggregator, run.date) == (Rounds(2), FedIT(), "2026-01-31")
    nested = parse_run(f'{BASE}[plan.rank]\ntype = "FixedRank"\nrank = 2\n')
    assert nested.plan == Plan(FixedRank(2), default.plan.local_steps)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[schedulle]\n", "there is no field 'schedulle'; did you mean schedule?"),
        ("[schedule]\ncohortsize = 3\n", "schedule = 'cohortsize': there is no field 'cohortsize'; did you mean cohort_size?"),
        ('[schedule]\ntype = "FedBuf"\n', "schedule.type = 'FedBuf': did you mean FedBuff?"),
        ('[schedule]\ntype = "HLoRA"\n', "one of FedAsync, FedBuff, FedFa, Immediate, Rounds"),
        ("[schedule]\ntype = 3\n", "schedule.type = 3"),
        ("[availability]\nclients = 3\n", 'say what it is with type = "..."'),
        ("[plan]\nlocal_steps = true\n", "plan.local_steps = True: expected a whole number"),
        ("[plan.rank]\nranks = [2, 'x']\n", "plan.rank.ranks[1] = 'x'"),
        ("[training]\nlearning_rate = nan\n", "training.learning_rate = nan: expected a finite number"),
        ("[training]\nlearning_rate = -1\n", "give a positive number"),
        ('[training]\ndecay = "noised"\n', "expected a function such as constant"),
        ("[[world.tiers]]\nname = 'a'\n", "world.tiers[0] = 'Tier': missing its field 'share'"),
        ('aggregator = "print(1)"\n', "aggregator = 'print(1)'"),
        ("seed = 1 = 2\n", "it is not TOML"),
        (f"seed = {'[' * 5000}", "nested too deeply"),
        (f"seed = {'9' * 5000}\n", "it is not TOML: Exceeds the limit"),
        (f"a{'.a' * 100_000} = 1\n", "1,000 dots in a line"),
        ('name = "a\\u0000b"\n', "the character of number 0"),
        (f"# {'x' * 2**20}\n", "it has more than 1,048,576 bytes"),
        ("aggregator = 'HLoRA(**{\"rank\": 3})'\n", "write each field by its name"),
        ('[data]\npath = "C:\\Users"\n', "a path of Windows stands in single quotes"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_field_and_the_file(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text if "[data]" in text else BASE + text)
    with pytest.raises(Refused) as caught:
        load_run_file(file)
    assert told in str(caught.value)
    assert "mine.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for text, told in {'model = "m"\n': "missing its field 'data'", "": "missing its field 'model'"}.items():
        file.write_text(text)
        with pytest.raises(Refused, match=told):
            load_run_file(file)
    file.write_bytes('model = "müde"'.encode("cp1252"))
    with pytest.raises(Refused, match="not a text in UTF-8"):
        load_run_file(file)


@pytest.mark.parametrize(
    "code", ["__import__('os').getcwd()", "prepare(1)", "Run", "Server", "(lambda: 3)()", "[x for x in (1,)]"]
)
def test_nothing_in_a_file_is_executed(code: str) -> None:
    for field in ("aggregator", "schedule", "data", "world"):
        with pytest.raises(Refused):
            parse_run(
                f"model = 'm'\ndata = 'Tickets'\n{field} = {json.dumps(code)}\n".replace(
                    "data = 'Tickets'\ndata", "data"
                )
            )


def test_the_two_files_of_the_page_on_run_files_are_the_same_run(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "run-file.md").read_text(encoding="utf-8")
    runs = []
    for language, suffix in (("toml", ".toml"), ("python", ".py")):
        file = (tmp_path / "page").with_suffix(suffix)
        file.write_text(page.partition(f"```{language}\n")[2].partition("```")[0])
        runs.append(load_run_file(file))
    assert runs[0] == runs[1]
    assert jsonable(runs[0]) == jsonable(runs[1])
