"""Files of devices and traces: what they say, and that a mistake is told with its place."""

from __future__ import annotations

import json
import math
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.core.types import Profile
from fedloom.simulate.availability import Windows
from fedloom.simulate.device_files import AvailabilityFile, DeviceFile, FedScaleDevices
from fedloom.simulate.devices import Devices
from tests.support.storms import tries
from tests.support.toys import SHAPE, adapter, make_result, make_task

EXAMPLES = {"a": 1, "b": 2, "c": 3}
PHONES = {
    "1": {"computation": 162.0, "communication": 5648.109619499134},
    "2": {"computation": 50, "communication": 1000},
}
TRACES = {
    "7": {"duration": 500, "inactive": [300, 900], "finish_time": 1000, "active": [100, 700], "model": "CPH1801"},
    "9": {"duration": 0, "inactive": [], "finish_time": 1000, "active": [], "model": "never"},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(text: Any, name: str = "devices.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(
            text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
        )
        return path

    return written


def test_a_table_with_names_gives_each_client_its_line(write: Callable[..., Path]) -> None:
    path = write(
        "client, tier, flops, up_bps, down_bps, memory\n"
        "b,slow,1e9,1e6,2e6,4e9\n\nc,fast,5e10,1e8,1e8,8e9\na,slow,2e9,1e6,2e6,4e9\n"
    )
    assert DeviceFile(path).profiles(EXAMPLES, 0) == (
        Profile("a", 1, 2e9, 1e6, 2e6, 4e9, "slow"),
        Profile("b", 2, 1e9, 1e6, 2e6, 4e9, "slow"),
        Profile("c", 3, 5e10, 1e8, 1e8, 8e9, "fast"),
    )


def test_a_table_without_names_is_dealt_in_seeded_order_and_again_from_the_first(write: Callable[..., Path]) -> None:
    path = write("flops,up_bps,down_bps\r\n1e9,1,1\r\n2e9,2,2\r\n3e9,3,3\r\n")
    many = {f"c{k}": 1 for k in range(7)}
    dealt = DeviceFile(path).profiles(many, 0)
    assert set(Counter(p.flops for p in dealt).values()) == {2, 3}
    assert {p.flops for p in dealt[:3]} == {1e9, 2e9, 3e9}
    assert dealt == DeviceFile(path).profiles(dict(reversed(many.items())), 0)
    assert len({tuple(p.flops for p in DeviceFile(path).profiles(many, seed)) for seed in range(20)}) > 3
    assert {(p.memory, p.tier) for p in dealt} == {(Profile("", 0).memory, "default")}


def test_seconds_are_bytes_over_links_and_flop_over_speed(write: Callable[..., Path]) -> None:
    path = write("flops,up_bps,down_bps\n1e6,1e3,4e3\n")
    (profile,) = DeviceFile(path).profiles({"a": 1}, 0)
    task, result = make_task(adapter(4), 4, 1, "a"), make_result(adapter(4, 1), tokens=50)
    took = DeviceFile(path).seconds(task, result, profile, SHAPE, 0)
    assert took.up == pytest.approx(4 * took.down)
    assert took.train == pytest.approx(SHAPE.train_flops(50, 4) / 1e6)
    jittered = {DeviceFile(path, 0.5).seconds(make_task(adapter(4), 4, k, "a"), result, profile, SHAPE, 0).train
                for k in range(5)}  # fmt: skip
    assert len(jittered) == 5


@pytest.mark.parametrize("form", ["json", "csv"])
def test_fedscale_devices(write: Callable[..., Path], form: str) -> None:
    """162 ms for 1e9 FLOP is 6.2 GFLOP/s; kbit/s are 1000 bit/s."""
    rows = [f"{name},{one['computation']},{one['communication']}" for name, one in PHONES.items()]
    table = "\n".join(["client,computation,communication", *rows])
    path = write(PHONES if form == "json" else table, f"devices.{form}")
    dealt = FedScaleDevices(path).profiles({"a": 1, "b": 2}, 0)
    assert {p.flops for p in dealt} == {1e12 / 162.0, 2e10}
    assert {p.up_bps for p in dealt} == {p.down_bps for p in dealt} == {5648109.619499134, 1e6}
    assert [p.examples for p in dealt] == [1, 2]
    assert FedScaleDevices(path, 2e9).profiles({"a": 1, "b": 2}, 0)[0].flops == 2 * dealt[0].flops


@pytest.mark.parametrize("form", ["json", "csv"])
def test_fedscale_traces(write: Callable[..., Path], form: str) -> None:
    lines = ["client,active,inactive,finish_time", "x,0,10,20", "a,100,300,1000", "b,0,50,100", "a,700,900,1000"]
    named = {"x": TRACES["7"], "a": TRACES["7"], "b": {"active": [0], "inactive": [50], "finish_time": 100}}
    path = write(named if form == "json" else "\n".join(lines), f"traces.{form}")
    stays = AvailabilityFile(path, by_name=True).of(("a", "b"), 0)
    assert [stays.stay("a", k) for k in range(8)] == [0, 100, 200, 400, 200, 100, 0, 100]
    assert [stays.stay("b", k) for k in range(4)] == [50, 50, 50, 50]


def test_traces_are_dealt_and_may_be_never_or_always(write: Callable[..., Path]) -> None:
    always = {"active": [0], "inactive": [5000], "finish_time": 1000}
    open_end = {"active": [0, 600], "inactive": [500], "finish_time": 1000}
    stays = AvailabilityFile(write(TRACES | {"11": always, "13": open_end}, "t.json")).of(
        [f"c{k}" for k in range(8)], 0
    )
    found = Counter(tuple(stays.stay(f"c{k}", n) for n in range(2)) for k in range(8))
    assert found == {(0.0, 100.0): 2, (0.0, math.inf): 2, (math.inf, 0.0): 2, (500.0, 100.0): 2}


GOOD = "client,flops,up_bps,down_bps\na,1,1,1\nb,1,1,1\nc,1,1,1\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no entries"),
        ("flops,up_bps,down_bps\n", "no entries"),
        ("flops,up_bps\n1,1\n", "line 1: there is no column 'down_bps'"),
        ("flops,flops,up_bps,down_bps\n", "line 1: column 'flops' is there twice"),
        ("flops,up_bps,down_bps,gpu\n", "line 1: column 'gpu' is not known; the columns are"),
        (GOOD.replace("b,1,1,1", "b,1,fast,1"), "line 3, up_bps: 'fast' must be a positive number"),
        (GOOD.replace("c,1,1,1", "c,1,1,0"), "line 4, down_bps: '0' must be"),
        (GOOD.replace("c,1,1,1", "c,-1,1,1"), "line 4, flops: '-1' must be"),
        (GOOD.replace("c,1,1,1", "c,inf,1,1"), "line 4, flops: 'inf' must be"),
        (GOOD.replace("c,1,1,1", "c,nan,1,1"), "line 4, flops: 'nan' must be"),
        (GOOD.replace("c,1,1,1", "c,1,1"), "line 4 has 3 cells; the header has 4"),
        (GOOD.replace("c,1,1,1", "c,,1,1"), "line 4, flops: the cell is empty"),
        (GOOD.replace("c,1,1,1", "a,1,1,1"), "client 'a' has two entries: line 2 and line 4"),
        (GOOD.replace("c,1,1,1", "d,1,1,1"), "1 clients have no entry: add c"),
        (GOOD + 'd,"1,1,1\n', "line 5"),
        (GOOD + "unneeded,x,1,1\n", "line 5, flops"),
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        (pickle.dumps({"a": 1}), "a pickle may run code and is never opened; export it to JSON"),
    ],
)
def test_a_mistake_in_a_table_is_told_with_its_place(write: Callable[..., Path], text: str, told: str) -> None:
    with pytest.raises(Refused) as caught:
        DeviceFile(write(text)).profiles(EXAMPLES, 0)
    assert told in str(caught.value)
    assert caught.value.field == "world.path"


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "object of objects"),
        ('{"1": 5}', "object of objects"),
        ("{}", "no entries"),
        ("[" * 100000, "nested too deep"),
        ('{"1": {"computation": 5}}', "client '1' has no 'communication'"),
        ('{"1": {"computation": null, "communication": 1}}', "client '1', computation: None must be a positive number"),
        ('{"1": {"computation": true, "communication": 1}}', "client '1', computation: True must be"),
        ('{"1": {"computation": NaN, "communication": 1}}', "client '1', computation: nan must be"),
        ('{"1": {"computation": [1], "communication": 1}}', "client '1', computation: [1] must be"),
        ('{"1": {"computation": 1e999, "communication": 1}}', "client '1', computation: inf must be"),
        ('{"1": {"computation": ' + "9" * 400 + ', "communication": 1}}', "client '1', computation"),
        ('{"1": {"computation": ' + "9" * 9000 + ', "communication": 1}}', "is not JSON"),
    ],
)
def test_a_mistake_in_fedscale_devices_is_told(write: Callable[..., Path], given_: str, told: str) -> None:
    with pytest.raises(Refused) as caught:
        FedScaleDevices(write(given_, "devices.json")).profiles({"a": 1}, 0)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"active": [100, 200]}, "active and inactive times must alternate and grow"),
        ({"active": [400, 700]}, "must alternate and grow"),
        ({"active": [100]}, "must alternate and grow"),
        ({"active": 5}, "active: give a list of seconds"),
        ({"inactive": [300, "x"]}, "client '7', inactive: 'x' must be 0 or a positive number"),
        ({"inactive": [300, -9]}, "inactive: -9 must be"),
        ({"finish_time": 0}, "client '7', finish_time: 0 must be"),
        ({"active": [], "inactive": []}, "none of the clients is ever available"),
    ],
)
def test_a_mistake_in_a_trace_is_told(write: Callable[..., Path], change: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused) as caught:
        AvailabilityFile(write({"7": TRACES["7"] | change}, "t.json")).of(("a",), 0)
    assert told in str(caught.value)
    assert caught.value.field == "availability.path"


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(Refused, match="cannot be read"):
            DeviceFile(path).profiles(EXAMPLES, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeviceFile("x", jitter=-1),
        lambda: FedScaleDevices("x", sample_flops=0),
        lambda: FedScaleDevices("x", jitter=math.nan),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(Refused):
        make()


def test_they_fit_a_run() -> None:
    assert schema.matches_type(DeviceFile("x"), Devices)
    assert schema.matches_type(FedScaleDevices("x"), Devices)
    assert schema.matches_type(AvailabilityFile("x"), Windows | None)
    assert not schema.matches_type(DeviceFile("x"), Windows | None)


def refused_or(read: Callable[[], Any]) -> Any:
    """What is read, or the refusal, which is one sentence; any other error is raised."""
    try:
        return read()
    except Refused as error:
        refused = error
    assert "\n" not in str(refused)
    return refused


CELL = st.one_of(
    st.floats().map(str), st.integers().map(str), st.text(max_size=6), st.sampled_from(("1", "2e9", "", '"'))
)
HEADER = st.lists(st.sampled_from(("client", "flops", "up_bps", "down_bps", "memory", "tier", "x", "")), max_size=7)


@given(st.binary(max_size=80) | st.tuples(HEADER, st.lists(st.lists(CELL, max_size=7), max_size=4)))
@tries(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_is_read_or_refused_in_one_sentence(write: Callable[..., Path], given_: Any) -> None:
    text = (
        given_
        if isinstance(given_, bytes)
        else "\n".join(",".join(row) for row in [given_[0], *given_[1]]).encode(errors="replace")
    )
    path = write(text)
    profiles = refused_or(lambda: DeviceFile(path).profiles(EXAMPLES, 0))
    if not isinstance(profiles, Refused):
        assert [p.client for p in profiles] == list(EXAMPLES)
        assert all(0 < number < math.inf for p in profiles for number in (p.flops, p.up_bps, p.down_bps, p.memory))


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(("active", "inactive", "finish_time", "computation", "communication", "1")), inner
        )
    ),
    max_leaves=12,
)


@given(JSON | st.dictionaries(st.text(max_size=3), JSON, max_size=3))
@tries(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_read_or_refused_in_one_sentence(write: Callable[..., Path], given_: Any) -> None:
    path = write(json.dumps(given_), "any.json")
    assert refused_or(lambda: FedScaleDevices(path).profiles(EXAMPLES, 0))
    assert refused_or(lambda: AvailabilityFile(path).of(("a",), 0))


@given(st.lists(st.floats(0, 1e5), max_size=9), st.floats(1, 1e5))
@tries(40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_periods_of_a_trace_fill_its_cycle(write: Callable[..., Path], times: list[float], length: float) -> None:
    ordered = sorted(times)
    trace = {"active": ordered[::2], "inactive": ordered[1::2], "finish_time": length}
    always = {"active": [0], "inactive": [1], "finish_time": 1}
    stays = AvailabilityFile(write({"a": trace, "b": always}, "t.json"), by_name=True).of(("a", "b"), 0)
    two = [stays.stay("a", k) for k in range(2)]
    if math.inf not in two:
        count = len(stays.cycles["a"])  # type: ignore[attr-defined]
        assert sum(stays.stay("a", k) for k in range(count)) == pytest.approx(length)
