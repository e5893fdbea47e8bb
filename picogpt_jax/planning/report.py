"""Plans as text and as a picture."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from picogpt_jax.training.plot import COLOURS, save_png, styled_figure

Plan = Mapping[str, Any]

GIB = 1 << 30


def format_plan(plan: Plan) -> str:
    """One plan, as text."""
    lines = [
        f"{plan['topology']}: {plan['chips']} chips {plan['chip']}, mesh {_mesh(plan)}, {_mode(plan)}",
        f"{plan['parameters']:,} parameters; {plan['batch_size']} sequences, {plan['tokens_per_step']:,} tokens a step "
        f"in {plan['gradient_accumulation_steps']} parts, {plan['tokens_per_chip']:,.0f} tokens a chip",
        "",
        *_memory(plan),
    ]
    if "mfu" not in plan:
        return "\n".join(lines)
    lines += ["", *_work(plan), "", *_collectives(plan), "", *_time(plan), "", "What the estimate leaves out:"]
    lines += [f"- {item}" for item in plan["left_out"]]
    lines.append(f"Compiled in {plan['compile_seconds']:.0f} s{', with less optimization' if plan['quick'] else ''}.")
    return "\n".join(lines)


def _mesh(plan: Plan) -> str:
    return " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())


def _mode(plan: Plan) -> str:
    return "int8 QAT" if plan["quant_mode"] == "int8" else "float (quant.mode=none)"


def _memory(plan: Plan) -> list[str]:
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    needed, there = plan["bytes_per_chip"] / GIB, plan["chip_memory_bytes"] / GIB
    lines = [f"memory a chip  {needed:9.2f} GiB of {there:.0f} GiB: {verdict}"]
    rows = {"  parameters": plan["parameter_bytes_per_chip"], "  optimizer": plan["optimizer_bytes_per_chip"]}
    if "memory" in plan:
        rows["  temporaries"] = plan["memory"]["temporaries"]
        if plan["memory"]["program"]:  # the GPU compiler does not tell it
            rows["  program"] = plan["memory"]["program"]
    totals = {"  parameters": plan["parameter_bytes"], "  optimizer": plan["optimizer_bytes"]}
    for name, size in rows.items():
        whole = f", of {totals[name] / GIB:.2f} GiB in all" if name in totals else ""
        lines.append(f"{name:<14} {size / GIB:9.2f} GiB{whole}")
    return lines


def _work(plan: Plan) -> list[str]:
    lines = ["matmuls, all chips     count         FLOPs"]
    for name, row in plan["matmuls"].items():
        lines.append(f"  {name:<16} {row['count']:>9,}  {row['flops']:12.4g}")
    total, model = plan["flops_per_step"], plan["model_flops_per_step"]
    lines.append(
        f"  in all            {'':>8}  {total:12.4g}  = {total / model:.2f} x {model:.4g} (6 N + 12 L T C a token, "
        "arXiv 2204.02311, appendix B: what MFU counts)"
    )
    return lines


def _collectives(plan: Plan) -> list[str]:
    lines = ["collectives          count       GB a chip         ms"]
    for name, row in sorted(plan["collectives"].items(), key=lambda item: -item[1]["ms"]):
        lines.append(f"  {name:<16} {row['count']:>7,}  {row['bytes'] / 1e9:12.4f}  {row['ms']:9.2f}")
    lines.append("the largest, by type and mesh axes")
    for row in plan["largest_collectives"]:
        name = f"{row['kind']} {row['dtype']} {row['axes']}{', hidden' if row['overlapped'] else ''}"
        source = row["largest"][-60:]
        lines.append(f"  {name:<46} {row['count']:>6,}  {row['bytes'] / 1e9:9.4f}  {row['ms']:9.2f}  {source}")
    return lines


def _time(plan: Plan) -> list[str]:
    serial = plan["step_time_ms_nothing_hidden"]
    return [
        f"compute {plan['compute_ms']:.1f} ms, memory {plan['memory_ms']:.1f} ms, interconnect "
        f"{plan['interconnect_ms']:.1f} ms, of which {plan['exposed_interconnect_ms']:.1f} ms are not hidden",
        f"step {plan['step_time_ms']:.1f} ms, {plan['tokens_per_second']:,.0f} tokens/s, MFU {plan['mfu']:.1%} "
        f"(with nothing hidden: {serial:.1f} ms, {plan['mfu_nothing_hidden']:.1%}); at best",
    ]


def format_comparison(plans: Sequence[Plan]) -> str:
    """Ranked plans as a table."""
    measured = ["GiB a chip", "ms/step", "tokens/s", "MFU", "bound by", "compiled"]
    rows = [["data", "fsdp", "tensor", "batch", "products", *measured]]
    for plan in plans:
        row = [*map(str, plan["mesh"].values()), str(plan["batch_size"])]
        row.append("int8" if plan["quant_mode"] == "int8" else "bfloat16")
        if "error" in plan:
            rows.append([*row, plan["error"]])
            continue
        row.append(f"{plan['bytes_per_chip'] / GIB:.2f}")
        if "mfu" in plan:
            row += [
                f"{plan['step_time_ms']:.1f}",
                f"{plan['tokens_per_second']:,.0f}",
                f"{plan['mfu']:.1%}",
                _bound(plan),
                "quickly" if plan["quick"] else "in full",
            ]
        rows.append(row if plan["fits"] else [*row, "does not fit"])
    return "\n".join(_table(rows))


def _bound(plan: Plan) -> str:
    """What alone would take the longest."""
    return max(("compute", "memory", "interconnect"), key=lambda what: plan[f"{what}_ms"])


def format_scaling(plans: Sequence[Plan]) -> str:
    """Plans of a weak scaling as a table."""
    rows = [["topology", "chips", "batch", "ms/step", "tokens/s", "tokens/s a chip", "MFU", "efficiency"]]
    for plan in plans:
        rate = plan["tokens_per_second"]
        rows.append([plan["topology"], str(plan["chips"]), str(plan["batch_size"]), f"{plan['step_time_ms']:.1f}"])
        rows[-1] += [f"{rate:,.0f}", f"{rate / plan['chips']:,.0f}", f"{plan['mfu']:.1%}", f"{plan['efficiency']:.1%}"]
    return "\n".join(_table(rows))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns; a row may end early with a long remark."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def scaling_label(plan: Plan) -> str:
    """What the plans of one weak scaling have in common."""
    return f"{plan['chip']}, {_mode(plan)}, {plan['batch_size'] / plan['chips']:g} sequences a chip"


def plot_scaling(series: Mapping[str, Sequence[Plan]], png_path: str | os.PathLike[str], title: str) -> None:
    """Draws tokens/s a chip, relative to the smallest slice, against the number of chips.

    Args:
        series: label -> the plans of one weak scaling.

    Raises:
        UserError: matplotlib is missing.
    """
    with styled_figure(8, 4.2) as figure:
        from matplotlib.ticker import PercentFormatter, ScalarFormatter

        axes: Any = figure.subplots()
        for (label, plans), colour in zip(series.items(), COLOURS, strict=False):
            chips = [plan["chips"] for plan in plans]
            axes.plot(chips, [plan["efficiency"] for plan in plans], "o-", color=colour, label=label)
        axes.axhline(0.9, color="#8a8f98", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="chips", ylabel="tokens/s a chip, of the smallest slice's", xscale="log")
        largest = max((plan["efficiency"] for plans in series.values() for plan in plans), default=1.0)
        axes.set_ylim(0.0, 1.06 * max(1.0, largest))
        axes.set_xticks(sorted({plan["chips"] for plans in series.values() for plan in plans}))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.legend(loc="lower left", edgecolor="none")
    save_png(figure, png_path, dpi=110)
