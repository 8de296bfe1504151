"""What exporting and building cost: the document's table, and our claims, are those of the records."""

from __future__ import annotations

import copy

import pytest

from benchmarks import costs


def test_the_document_says_what_the_records_say() -> None:
    assert costs.PART.read() == costs.table(costs.records())


def test_a_further_image_size_is_cheap() -> None:
    shares = [record["extra_info"].get("further_over_first_seconds") for record in costs.records().values()]
    assert [share["median"] <= 0.4 for share in shares if share] == [True, True]


@pytest.mark.xfail(strict=True, reason="34 s instead of 20, 4.2 s instead of 4, 3.03 times the weights")
def test_what_we_claim_holds() -> None:
    assert list(costs.broken(costs.records())) == []


def test_what_does_not_hold_is_said() -> None:
    found = copy.deepcopy(costs.records())
    export = found["test_export_vit_b16_fp32_and_fp16"]
    found["test_export_digits_fp32_and_fp16"] = {"stats": {"median": 3.0, "rounds": 5}, "extra_info": {}}
    export["stats"]["median"], memory = 19.0, export["extra_info"]["peak_beyond_framework_over_weights"]
    memory["median"] = 2.9
    assert list(costs.broken(found)) == []
    export["stats"]["median"], memory["median"] = 21.0, 3.1
    del found["test_export_digits_fp32_and_fp16"]
    assert [text.split()[-2:] for text in costs.broken(found)] == [
        ["20", "s"],
        ["no", "record"],
        ["than", "3"],
    ]
