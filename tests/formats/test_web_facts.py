import dataclasses
import re
from typing import Any

import pytest
from test_onnx_integer import random_integer_model

from picogpt_jax.formats.web_facts import facts

CURVE = {"train": {"step": [1, 50, 100], "loss": [4.0, 2.5, 2.0]}, "val": {"step": [50, 100], "loss": [2.75, 2.25]}}


def shown(**training: Any) -> str:
    return facts(dataclasses.replace(random_integer_model(), training=training))


def test_a_model_tells_what_its_folder_carries() -> None:
    name = "transformer.h.0.mlp.c_fc"
    html = shown(dataset="a <b>", step=8000, val_loss=1.5, curve=CURVE, weight_errors={name: 0.0123})
    assert "a &lt;b&gt;" in html
    assert "8,000 steps" in html
    assert "2.164 bits" in html
    assert "training from 4.00 to 2.00; validation from 2.75 to 2.25" in html
    assert len(re.findall(r"<title>validation, step \d+: ", html)) == 2
    assert re.search(r"layer 1</span> network, in</th>.*?<td>1\.2 %</td>", html)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"step": None, "val_loss": None, "dataset": None, "curve": None, "weight_errors": []},
        {"curve": {"train": {"step": [1], "loss": ["x"]}, "val": {}}, "weight_errors": {"transformer.wte": "x"}},
        {"curve": {"train": {"step": [], "loss": []}, "val": {"step": [], "loss": []}}, "val_loss": 2},
        {
            "curve": {"train": {"step": [10**400], "loss": [1]}, "val": {}},
            "weight_errors": {"transformer.wte": 10**400},
        },
        {"curve": {"train": {"step": [1], "loss": [1e300]}, "val": {"step": [], "loss": []}}, "step": 10**400},
        {"curve": {"train": {"step": [1, 2], "loss": [1]}, "val": {"step": [], "loss": []}}},
    ],
)
def test_an_older_or_another_folder_shows_less(training: dict[str, Any]) -> None:
    html = shown(**training)
    assert "How it learned" not in html
    assert html.count('<tr><th scope="row">') == len(random_integer_model().matrices)
    assert "a text of its own" in html
