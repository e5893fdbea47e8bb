"""The page of `python scripts/benchmark.py gpu`: what was measured on a GPU, beside the goals."""

from collections.abc import Mapping, Sequence
from typing import Any

from picogpt_jax.benchmarks.gpu import CONTENDERS, DEFAULT, GPT2
from picogpt_jax.benchmarks.html_page import document, html_table, section, shown

MARK = '<meta name="generator" content="picogpt_jax gpu">'  # of a file that a new page may replace
NAME_LENGTH = 80  # of a kernel


def page(report: Mapping[str, Any]) -> str:
    """The page of a report of `picogpt_jax.benchmarks.gpu`, which may be unfinished."""
    results = {name: part["result"] for name, part in report["parts"].items() if "result" in part}
    device = results.get("device")
    title = f"On a GPU: {device['device_kind'] if device else 'not recognised'}"
    sections = [_machine(report, device), _goals(report["goals"])]
    sections += [_steps(results), *_kernels(results), _logits(results), _recipe(results), _tests(results)]
    return document(title, MARK, [*filter(None, sections), _parts(report)], "scripts/benchmark.py")


def _machine(report: Mapping[str, Any], device: Mapping[str, Any] | None) -> str:
    facts = [("Date", report["date"], ""), ("Measured in", f"{report['seconds']:.0f} s", "")]
    if device:
        jax = f"jax {device['versions']['jax']}"
        versions = {f"{name} {version}" for name, version in device["versions"].items()} - {jax}
        memory = _gibibytes(device["memory_limit_bytes"])
        facts.insert(0, ("GPU", device["device_kind"], memory and f"{memory} GiB for JAX"))
        facts += [("CPU", device["cpu"], f"{device['cores']} cores"), ("Versions", jax, ", ".join(sorted(versions)))]
        facts.append(("Platform", device["platform_version"], ""))
    return f'<section aria-label="Summary">{_facts(facts)}</section>'


def _facts(facts: Sequence[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{shown(value)}{f' <small>{shown(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in facts
    )
    return f"<dl>{cells}</dl>"


def _goals(goals: Sequence[Mapping[str, Any]]) -> str:
    words = {True: "\u2713 met", False: "\u2717 missed", None: "open"}
    rows = [[row["goal"], f"{words[row['is_met']]}: {row['found']}"] for row in goals]
    met = sum(row["is_met"] is True for row in goals)
    return section("Goals", html_table(f"{met} of {len(rows)} are met", ["goal", "found"], rows, "words"))


def _steps(results: Mapping[str, Any]) -> str:
    parts = []
    for model in (GPT2, DEFAULT):
        measured = {name: results[f"{model}, {name}"] for name in CONTENDERS if f"{model}, {name}" in results}
        if not measured:
            continue
        first = next(iter(measured.values()))
        baseline = measured.get("bf16")
        rows = []
        for name, steps in measured.items():
            plan = results.get(f"plan, {name}") if model == GPT2 else None
            ratio = f"{steps['step_time_ms'] / baseline['step_time_ms']:.2f}" if baseline else ""
            row = [name, f"{steps['step_time_ms']:.2f}", f"{steps['step_time_ms_min']:.2f}", ratio]
            row += [f"{steps['tokens_per_second']:,.0f}", "" if steps["mfu"] is None else f"{steps['mfu']:.1%}"]
            row += [_gibibytes(steps["peak_bytes"]), _gibibytes(steps["compiled_bytes"])]
            row += [_gibibytes(plan and plan["bytes_per_chip"]), f"{steps['compile_seconds']:.1f}", steps["attention"]]
            rows.append(row)
        tokens = f"{first['batch_size']} x {first['block_size']} tokens a step"
        caption = f"{first['parameters']:,} parameters, {tokens}, remat {first['remat']}"
        head = ["", "ms a step", "least", "of bf16", "tokens/s", "MFU", "peak GiB", "compiled", "planned", "compile, s"]
        parts.append(f"<h3>{model}</h3>" + html_table(caption, [*head, "attention"], rows))
    note = (
        '<p class="soft">Medians of rounds of several steps. Memory: the most that was in use, tuning included; what '
        "the compiler asks for; what scripts/plan.py says without a GPU. MFU is against the bfloat16 peak of the data "
        "sheet.</p>"
    )
    return section("Training steps", note, *parts) if parts else ""


def _kernels(results: Mapping[str, Any]) -> list[str]:
    rows, traces = [], []
    shown_as = {True: "yes", False: "no", None: "not shown"}
    for model in (GPT2, DEFAULT):
        for name in CONTENDERS:
            steps = results.get(f"{model}, {name}")
            if steps is None:
                continue
            total = sum(row["flops"] for row in steps["products"])
            for row in steps["products"]:
                cells = [row["precision"], row["origin"], shown_as[row["tensor_cores"]], str(row["count"])]
                rows.append([f"{model}, {name}", *cells, f"{row['flops'] / total:.1%}"])
            if steps["kernels"]:
                named = [
                    [row["name"][:NAME_LENGTH], f"{row['ms']:.2f}", str(row["calls"]), f"{row['share']:.1%}"]
                    for row in steps["kernels"]
                ]
                caption = f"{model}, {name}: {steps['steps_per_round']} steps"
                traces.append(html_table(caption, ["kernel", "ms", "calls", "share"], named))
    if not rows:
        return []
    head = ["", "operands", "kernels", "tensor cores", "products a step", "of the FLOPs"]
    note = (
        '<p class="soft">Read from the compiled program, after autotuning. Of a library only the names of its kernels '
        'show what it uses: "imma", "s8", "i8" and "gmma" are int8 on tensor cores.</p>'
    )
    opened = f"<details><summary>The kernels that took most time, in a trace</summary>{''.join(traces)}</details>"
    table = html_table("What computes the products", head, rows)
    return [section("Kernels", note, table, opened if traces else "")]


def _logits(results: Mapping[str, Any]) -> str:
    if "logits" not in results:
        return ""
    rows = [
        [row["forward"], row["size"], " x ".join(map(str, row["shape"])), _equal(row), row["digest"]]
        for row in results["logits"]
    ]
    caption = "Random models in integers, the GPU's logits and the CPU's"
    return section("Logits", html_table(caption, ["forward pass", "layers x width", "logits", "", "digest"], rows))


def _equal(row: Mapping[str, Any]) -> str:
    return "equal in every bit" if row["equal"] else f"different by up to {row['largest_difference']:g}"


def _recipe(results: Mapping[str, Any]) -> str:
    recipe, model = results.get("recipe"), results.get("recipe's int8 model")
    if recipe is None:
        return ""
    facts = [
        ("From start to end", f"{recipe['seconds']:.1f} s", f"{recipe['steps']:,} steps"),
        ("A step", f"{recipe['step_time_ms']:.2f} ms", "median of what metrics.jsonl says"),
        ("Best validation loss", f"{recipe['best_val_loss']:.4f} nats", f"the last {recipe['val_loss']:.4f}"),
    ]
    if model:
        facts.append(("Its int8 model, GPU and CPU", _equal(model), f"logits {model['digest']}"))
    return section("The Shakespeare recipe", _facts(facts))


def _tests(results: Mapping[str, Any]) -> str:
    tests = results.get("tests")
    if tests is None:
        return ""
    counts = ", ".join(f"{count} {name}" for name, count in tests["counts"].items())
    failures = f"<pre>{shown(chr(10).join(tests['failures']))}</pre>" if tests["failures"] else ""
    return section("Tests", f"<p>{counts}, in {shown(', '.join(tests['files']))}.</p>", failures)


def _parts(report: Mapping[str, Any]) -> str:
    rows = [
        [name, part["what"], f"{part.get('error', 'done')}, {part['seconds']:.0f} of {part['budget_seconds']:.0f} s"]
        for name, part in report["parts"].items()
    ]
    return section("Parts", html_table("What ran", ["part", "what", "how it ended"], rows, "words"))


def _gibibytes(n_bytes: float | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 2**30:.2f}"
