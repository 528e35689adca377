"""Activations in a folder: another run finds them, and nothing that is trained or scored depends on it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.types import ClientState
from fedloom.train import peft_weights
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.engine import activation_files
from fedloom.train.engine.activation_files import ActivationFiles, open_activation_files
from fedloom.train.engine.frozen_layers import ActivationCache, frozen_features, split_at
from fedloom.train.evaluate import KeptActivations, score
from fedloom.train.settings import PLAIN, Engine, LoRA
from tests.support.families import FAMILIES
from tests.support.tiny_runs import answered, base_of, lively, same, trainer_of, writer_of
from tests.train.engine.test_frozen_layers import shallow

ROOM = 1_000_000
KINDS = pytest.mark.parametrize("kind", ["encoder", "decoder"])


def opened(base: Base, folder: Path, size: int = 10**7, **machine: object) -> ActivationFiles:
    """What one process sees of the folder."""
    files = open_activation_files(
        base, replace(PLAIN, cache=ROOM, cache_dir=str(folder), cache_dir_bytes=size), machine
    )
    assert files is not None
    return files


def stored(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def trained(
    base: Base, files: ActivationFiles | None, rows: Sequence[int], room: int = ROOM, fold: int | None = None
) -> Adapter:
    """What a client with these rows sends back, of whose layers the top ones are trained."""
    trainer = replace(
        trainer_of(base),
        engine=replace(PLAIN, cache=room),
        shards={"a": tuple(rows)},
        cache=ActivationCache(files=files),
    )
    ((result, _),) = trainer.train([(shallow(base, fold=fold), ClientState())])
    return result.adapter


@KINDS
def test_training_is_the_same_bytes_without_a_folder_and_whoever_filled_it(
    request: pytest.FixtureRequest, kind: str, tmp_path: Path
) -> None:
    """Other runs divided the texts in another way, came in another order, or have no memory to keep them in."""
    base = base_of(request.getfixturevalue(kind), dropout=0.1)
    rows, others, filled = range(4, 22), ([*range(30, 24, -1), 7, 9], [*range(21, 12, -1)]), tmp_path / "filled"
    plain = trained(base, None, rows)
    for theirs in others:
        trained(base, opened(base, filled), theirs)
    assert same(trained(base, opened(base, filled), rows), plain)
    assert same(trained(base, opened(base, filled), rows, room=1), plain)
    assert same(trained(base, opened(base, tmp_path / "empty"), rows), plain)


def test_a_second_run_computes_nothing_below_and_scoring_finds_what_training_left(
    generator: Path, tmp_path: Path
) -> None:
    base = writer_of(generator)
    texts, start = answered(base), lively(initial_adapter(base, 4))
    version = Adapter({n: f if ".1." in n else initial_adapter(base, 4).factors[n] for n, f in start.factors.items()})
    plain = score(base, version, texts, range(9), None, KeptActivations(ROOM, 1))
    lowest, calls = base.model.get_base_model().get_submodule("model.layers.0"), list[int]()
    for computed in (9, 0):
        hook = lowest.register_forward_hook(lambda *_: calls.append(1))
        kept = KeptActivations(ROOM, 1, ActivationCache(files=opened(base, tmp_path)))
        found = score(base, version, texts, range(9), None, kept)
        hook.remove()
        assert len(calls) == computed
        assert torch.equal(found.losses, plain.losses)
        calls.clear()


@KINDS
def test_a_run_goes_on_from_what_another_depth_left_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """Only the blocks between are computed."""
    family = FAMILIES[{"encoder": "BERT", "decoder": "Llama"}[kind]]
    base, calls = base_of(family.save(tmp_path / "model")), list[int]()
    blocks = cast(Any, peft_weights.transformer_blocks(base.model))[1]
    texts, rows = trainer_of(base).texts, tuple(range(4, 9))
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))

    def outputs(first: int, files: ActivationFiles | None) -> list[Tensor]:
        cache = ActivationCache(files=files)
        features = frozen_features(base, texts, split_at(base, first), rows, (), cache, ROOM)
        base.model.eval()
        calls.clear()
        features.for_batch(rows)
        return [features.stored[i] for i in rows]

    alone, kept = outputs(3, None), opened(base, tmp_path / "kept")
    assert calls == [0, 1, 2] * len(rows)
    outputs(1, kept)
    assert all(torch.equal(*pair) for pair in zip(outputs(3, kept), alone, strict=True))
    assert calls == [1, 2] * len(rows)
    assert all(torch.equal(*pair) for pair in zip(outputs(2, kept), outputs(2, None), strict=True))


def test_what_others_changed_below_is_not_kept_for_other_runs(encoder: Path, tmp_path: Path) -> None:
    base = base_of(encoder)
    assert same(trained(base, opened(base, tmp_path), range(30), fold=3), trained(base, None, range(30), fold=3))
    assert not stored(tmp_path)


def damaged(data: bytes) -> list[bytes]:
    """Torn at the end, empty, with another byte, with zeros where a power cut left them."""
    return [data[:-1], b"", data[:-1] + bytes([data[-1] ^ 1]), bytes(len(data))]


def test_a_damaged_file_counts_as_missing_and_is_written_again(encoder: Path, tmp_path: Path) -> None:
    base, texts = base_of(encoder), trainer_of(base_of(encoder)).texts
    files, rows = opened(base, tmp_path), [torch.arange(12.0).reshape(3, 4)]
    files.write(1, texts, [5], rows)
    (path,) = stored(tmp_path)
    whole = path.read_bytes()
    for data in damaged(whole):
        path.write_bytes(data)
        assert files.read(1, texts, [5]) is None
        files.write(1, texts, [5], rows)
        assert path.read_bytes() == whole
    path.unlink()
    assert files.read(1, texts, [5]) is None


def test_processes_that_write_one_file_at_once_never_show_half_of_it(encoder: Path, tmp_path: Path) -> None:
    base = base_of(encoder)
    texts, rows = trainer_of(base).texts, [torch.arange(40_000.0).reshape(10, 4000)]
    everybody = [opened(base, tmp_path) for _ in range(8)]

    def write_and_read(files: ActivationFiles) -> list[Tensor] | None:
        files.write(1, texts, [5], rows)
        return files.read(1, texts, [5])

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(write_and_read, everybody * 4):
            assert found is not None
            assert torch.equal(found[0], rows[0])
    assert len(stored(tmp_path)) == 1  # no draft is left


def test_a_full_folder_takes_nothing_more_says_so_once_and_changes_nothing(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(encoder)
    size = 30_000
    with caplog.at_level(logging.WARNING, "fedloom.train"):
        assert same(trained(base, opened(base, tmp_path, size), range(30)), trained(base, None, range(30)))
    assert 0 < sum(path.stat().st_size for path in stored(tmp_path)) <= size
    (line,) = caplog.messages
    assert "engine.cache_dir" in line
    assert "30,000 bytes" in line


def test_eight_processes_stay_within_the_size_together(encoder: Path, tmp_path: Path) -> None:
    base = base_of(encoder)
    texts, size, rows = trainer_of(base).texts, 100_000, [torch.zeros(5, 100)]
    everybody = [opened(base, tmp_path, size) for _ in range(activation_files.SHARE)]
    for number in range(60):
        for block, files in enumerate(everybody):
            files.below = tuple(f"{block} {number}" for _ in files.below)
            files.write(1, texts, [number], rows)
    assert 0.7 * size < sum(path.stat().st_size for path in stored(tmp_path)) <= size


def test_a_folder_that_cannot_be_written_is_read_and_one_that_cannot_be_made_is_refused(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(encoder)
    files = opened(base, tmp_path / "there")
    assert not stored(tmp_path)  # a run that is only prepared writes nothing
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "activations").write_text("")
    files.write(1, trainer_of(base).texts, [5], [torch.zeros(3, 4)])
    files.write(1, trainer_of(base).texts, [6], [torch.zeros(3, 4)])
    assert len(caplog.messages) == 1
    for place in ("there", "there/activations/below"):
        with pytest.raises(Refused, match=r"engine\.cache_dir.*there/activations is a file"):
            opened(base, tmp_path / place)


def test_names_are_hashes_of_all_that_activations_depend_on(encoder: Path, tmp_path: Path) -> None:
    def hashes(
        rank: int = 4, seed: int = 3, kernel: str = "torch", weight: str = "", **machine: object
    ) -> tuple[str, ...]:
        base = load_base(str(encoder), 2, LoRA(), rank, seed, engine=Engine(kernel))
        if weight:
            base.model.get_base_model().get_parameter(weight).data[0] += 1e-6
        return opened(base, tmp_path, **machine).below

    plain = hashes()
    assert len({*plain}) == len(plain) == 2
    assert plain == hashes(rank=8, seed=4)  # an adapter and a head that nobody trained yet
    for other in (hashes(kernel="fused"), hashes(torch="9.9"), hashes(weight="bert.embeddings.LayerNorm.weight")):
        assert not {*plain} & {*other}
    first = hashes(weight="bert.encoder.layer.0.output.dense.bias")
    assert (first[0], first[1] == plain[1]) == (plain[0], False)
    assert plain == hashes(weight="bert.encoder.layer.1.output.dense.bias")


def test_a_text_is_found_by_its_tokens_alone(encoder: Path, tmp_path: Path) -> None:
    base = base_of(encoder)
    texts, files = trainer_of(base).texts, opened(base, tmp_path)
    files.write(1, texts, [5], [torch.ones(3, 4)])
    moved = replace(texts, ids=(texts.ids[5],), extras={n: (c[5],) for n, c in texts.extras.items()}, labels=(0,))
    assert files.read(1, moved, [0]) is not None
    cut = replace(moved, ids=(texts.ids[5][:-1],), extras={n: (c[5][:-1],) for n, c in texts.extras.items()})
    second = replace(moved, extras={n: (tuple(1 for _ in c[5]),) for n, c in texts.extras.items()})
    assert [files.read(1, other, [0]) for other in (cut, second)] == [None, None]
    assert files.read(0, texts, [5]) is files.read(1, texts, [4]) is files.read(1, texts, [5, 4]) is None
    (path,) = stored(tmp_path)
    assert {*path.parent.name, *path.name} <= {*"0123456789abcdef"}
    assert [part.stat().st_mode & 0o077 for part in (path, tmp_path / "activations")] == [0, 0]
