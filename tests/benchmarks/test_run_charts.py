import xml.etree.ElementTree as ET

from picogpt_jax.benchmarks.run_charts import bar_chart
from picogpt_jax.int8.convert import TensorReport


def report(name: str, sqnr_db: float, product_db: float | None) -> TensorReport:
    return TensorReport(f"transformer.{name}", (4, 2), (0.1, 0.2), 9, sqnr_db, product_db, 24)


def test_bars_are_as_long_as_their_ratio() -> None:
    rows = [report("h.0.mlp.c_fc", 40.0, 10.0), report("wpe", float("inf"), None), report("wte", 20.0, -3.0)]
    svg = ET.fromstring(bar_chart("bars", "t", "d", rows))
    widths = [(bar.get("class"), float(bar.get("width", 0))) for bar in svg.iter("rect")]
    full = widths[0][1]
    assert full > 0
    assert widths == [
        ("weights", full),
        ("products", full / 4),
        ("weights", full),  # nothing was lost: as far as the axis goes
        ("weights", full / 2),
        ("products", 0.0),
    ]
    texts = [text.text for text in svg.iter("text")]
    assert {"h.0.mlp.c_fc", "10.0", "wpe", "wte", "-3.0"} <= set(texts)
    assert len(svg.findall("path[@class='limit']")) == 1, "where products are bad"
