"""Tables of configurations: the format, the lookup, and the tables that are shipped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import interpreter  # noqa: F401  (before anything imports a kernel)
from tests.helpers.paths import ROOT
from vitdeploy_kernels.candidates import shared_memory
from vitdeploy_kernels.config import (
    MANY_ROWS,
    Config,
    Entry,
    Table,
    choose,
    format_table,
    load_table,
    parse_table,
    shipped_table,
    statistics_tile,
    table_name,
)
from vitdeploy_kernels.occupancy import LIMITS
from vitdeploy_kernels.problems import BUILDERS
from vitdeploy_kernels.specs import Spec

CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
POWERS = st.sampled_from([1 << i for i in range(4, 10)])
CONFIGS = st.builds(
    Config,
    block_m=POWERS,
    block_n=POWERS,
    block_k=POWERS,
    group=st.integers(1, 64),
    warps=st.sampled_from([1, 2, 4, 8, 16]),
    stages=st.integers(1, 8),
)
ENTRIES = st.builds(
    Entry,
    st.tuples(*[st.integers(1, 10**6)] * 3),
    CONFIGS,
    st.sampled_from(["fused", "cublas", "pair"]),
    st.none() | st.floats(0.1, 1e6),
)
TABLES = st.builds(
    Table,
    st.text(min_size=1),
    st.booleans(),
    st.dictionaries(
        st.sampled_from(sorted(BUILDERS)),
        st.lists(ENTRIES, min_size=1, max_size=5, unique_by=lambda entry: entry.shape).map(
            lambda entries: tuple(sorted(entries, key=lambda entry: entry.shape))
        ),
        min_size=1,
    ),
    st.dictionaries(st.text(), st.text()),
)


def small_table(*entries: Entry) -> Table:
    return Table("a GPU", False, {"linear_residual": entries}, {})


@pytest.mark.slow
@given(TABLES)
def test_what_is_written_is_read(table: Table) -> None:
    assert parse_table(format_table(table), "here") == table


@pytest.mark.slow
@given(CONFIGS)
def test_a_config_survives_as_a_list(config: Config) -> None:
    assert Config(*config.as_list()) == config


def test_the_nearest_shape_is_nearest_in_ratios() -> None:
    small, large = Entry((100, 768, 768), Config(16)), Entry((10000, 768, 768), Config(128))
    table = small_table(small, large)
    assert table.entry("linear_residual", (999, 768, 768)) is small
    assert table.entry("linear_residual", (1001, 768, 768)) is large
    assert table.entry("linear_residual", (1001, 76800, 768)) is large
    assert table.config("linear_residual", (0, 768, 768)) == small.config


@pytest.mark.slow
@given(st.lists(ENTRIES, min_size=1, max_size=6), st.tuples(*[st.integers(1, 10**6)] * 3))
def test_no_entry_is_nearer_than_the_one_that_is_found(entries: list[Entry], shape: tuple[int, ...]) -> None:
    def distance(entry: Entry) -> float:
        pairs = zip(entry.shape, shape, strict=True)
        return sum(math.log2(a / b) ** 2 for a, b in pairs)

    found = small_table(*entries).entry("linear_residual", shape)
    assert distance(found) == min(map(distance, entries))


@pytest.mark.slow
def test_a_known_shape_finds_itself() -> None:
    for capability in CAPABILITIES:
        table = shipped_table(capability)
        for name, entries in table.kernels.items():
            assert all(table.entry(name, entry.shape) == entry for entry in entries)


def test_a_kernel_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match="the table of a GPU has no configuration for attention"):
        small_table().entry("attention", (1, 2, 3))


def test_a_shape_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        small_table(Entry((1, 2, 3), Config())).entry("linear_residual", (1, 2))


GOOD = json.loads(format_table(small_table(Entry((1, 2, 3), Config()))))


def changed(**row: object) -> str:
    return json.dumps({**GOOD, "kernels": {"a": [{**GOOD["kernels"]["linear_residual"][0], **row}]}})


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ("[]", "indices must be integers"),
        (json.dumps({**GOOD, "kernels": []}), "has no attribute 'items'"),
        (json.dumps({name: value for name, value in GOOD.items() if name != "gpu"}), "'gpu'"),
        (changed(shape=[]), r"shape must be positive integers, not \[\]"),
        (changed(shape=[1, 0, 3]), "shape must be positive integers"),
        (changed(shape=[1, 2.5, 3]), "shape must be positive integers"),
        (changed(route="slow"), "'slow'"),
        (changed(config={"block_m": 100}), "block_m must be a power of two, not 100"),
        (changed(config={"warps": 3}), "warps must be a power of two, not 3"),
        (changed(config={"stages": 0}), "stages must be a positive integer, not 0"),
        (changed(config={"stages": True}), "stages must be a positive integer, not True"),
        (changed(config={"tile": 8}), "unexpected keyword argument 'tile'"),
        (changed(config=None), "must be a mapping"),
    ],
)
def test_what_is_no_table_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_table(path)
    assert str(error.value).startswith(f"{path} is not a table of kernel configurations: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shipped_table_has_every_kernel_and_fits_its_gpu(capability: tuple[int, int]) -> None:
    table = shipped_table(capability)
    assert table.gpu == f"sm_{10 * capability[0] + capability[1]}"
    assert not table.measured
    assert set(table.kernels) == set(BUILDERS)
    # As many heads and rows as any ViT has; and pixels of four bytes, which need the most memory.
    options = tuple({"heads": 1, "rows": 64, "nhwc": 0}.items())
    for name, entries in table.kernels.items():
        for entry in entries:
            spec = Spec(name, entry.shape, options)
            if name == "layernorm_attention":
                spec = Spec(name, entry.shape, (("heads", entry.shape[2] // 64),))
            assert shared_memory(spec, entry.config) <= LIMITS[capability].shared_per_program, (name, entry)
            assert entry.microseconds is None


@pytest.mark.parametrize("capability, gpu", [((8, 6), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100")])
def test_an_architecture_without_a_table_takes_the_one_before(capability: tuple[int, int], gpu: str) -> None:
    assert shipped_table(capability, "NVIDIA Unheard Of").gpu == gpu


def test_a_gpu_that_is_too_old_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no kernel configurations for compute capability 7\.5"):
        shipped_table((7, 5))


def test_an_operator_looks_its_configuration_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_up(device: torch.device) -> Table:
        raise AssertionError("looked up again")

    shape, device = (4242, 96, 32), torch.device("cpu")
    first = choose("layernorm_linear", shape, device)
    monkeypatch.setattr("vitdeploy_kernels.config.table_for", looked_up)
    assert choose("layernorm_linear", shape, device) is first
    with pytest.raises(AssertionError, match="looked up again"):
        choose("layernorm_linear", (4243, 96, 32), device)
    given = Config(block_m=32)
    assert choose("layernorm_linear", (4243, 96, 32), device, given.as_list()) == given


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", ["linear_residual", "patch_embed"])
def test_the_shape_of_statistics_does_not_depend_on_the_rows(
    kernel: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What suits many rows decides; few rows take the nearest configuration with such tiles."""
    monkeypatch.setattr("vitdeploy_kernels.config.table_for", lambda device: shipped_table(capability))
    device, (columns, depth) = torch.device("cuda", sum(capability)), (768, 768)
    tile = statistics_tile(kernel, columns, depth, device)
    assert tile == choose(kernel, (MANY_ROWS, columns, depth), device).block_n
    for rows in (1, 197, 1576, 12608, 50432):
        config = choose(kernel, (rows, columns, depth), device, tile=tile)
        assert config.block_n == tile
        assert config in [entry.config for entry in shipped_table(capability).kernels[kernel]]
    assert statistics_tile(kernel, columns, depth, device, tuple(Config(block_n=32).as_list())) == 32


def test_table_names_are_file_names() -> None:
    assert table_name("NVIDIA H200") == "NVIDIA_H200.json"
    assert table_name("../x") == "___x.json"


@pytest.mark.slow
def test_the_default_tables_are_what_their_script_writes() -> None:
    script = ROOT / "kernels" / "kernel_tools" / "defaults.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
