"""The training benchmark's results as Markdown."""

from __future__ import annotations

from typing import Any

RACES = ("against_baseline", "against_default")
PARTS = ("encode", "policy forward", "reference", "backward", "other")  # of a micro-step


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show_ratio(ratio: dict[str, float] | None, digits: int = 2) -> str:
    """Median and quartiles over the rounds."""
    return "{median:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**ratio, d=digits) if ratio else "-"


def show_race(results: dict[str, Any]) -> str:
    """Speed, ratio, efficiency, memory and milliseconds by part of every contestant."""
    first = next(iter(results))
    head = ["", "pairs/s", f"ratio to {first}", "share of matmul peak", "peak GiB", *PARTS, "optimizer"]
    rows = []
    for name, result in results.items():
        if "pairs_per_second" not in result:
            rows.append([name, result.get("error", "no time left"), *["-"] * (len(head) - 2)])
            continue
        memory = result["peak_bytes"]
        figures = [f"{result['pairs_per_second']['median']:.2f}", show_ratio(result.get(f"ratio_to_{first}"))]
        figures += [f"{result['share_of_matmul_peak']:.1%}", f"{memory / 2**30:.1f}" if memory else "-"]
        rows.append([name, *figures, *(f"{result['parts_ms'][part]:.1f}" for part in (*PARTS, "optimizer"))])
    return table(head, rows)


def show_counts(bases: dict[str, Any]) -> str:
    """FLOPs and bytes per pair by part of every base."""
    names = ("encode", "text", "policy forward", "backward", "recomputation", "optimizer")
    head = ["TFLOP and GB per pair", *names]
    rows = []
    for name, base in bases.items():
        title = f"{name}, {base['resolution']} px, {base['train_batch_size']} pairs"
        parts = (base["per_pair"][part] for part in names)
        rows.append([title, *(f"{part['flops'] / 1e12:.3g} / {part['bytes'] / 1e9:.3g}" for part in parts)])
    return table(head, rows)


def show_check(checked: dict[str, Any]) -> str:
    """Whether the baseline does the official work."""
    if "error" in checked:
        return checked["error"]
    return f"{checked['measured'] / 1e12:.4g} TFLOP per pair as run, {checked['ratio']:.4f} of the count"


def show_safeguard(cost: dict[str, Any]) -> str:
    """What the safeguard costs."""
    if "error" in cost:
        return cost["error"]
    alone, share = 1000 * cost["added_to_loss_s"], cost["share_of_micro_step"]
    text = f"{alone:.3f} ms on the loss alone, {share:.3%} of a micro-step"
    text += f"; updates with it take {show_ratio(cost['on_to_off'], 3)} of the time without"
    text += ", on average {mean:.4f} with a standard error of {standard_error:.4f}".format(**cost["on_to_off"])
    return text + (f"; {cost['added_peak_bytes']:+d} bytes at the peak" if "added_peak_bytes" in cost else "")


def show_data(base: dict[str, Any]) -> str:
    """What loading one pair costs, and what share of a core keeps up."""
    data, race = base["data_ms_per_pair"], base.get("against_baseline", {})
    default = race.get("default", {}).get("pairs_per_second")
    if data is None:
        return "not measured: a package that it needs is missing"
    cores = f"; {data['stored'] / 1000 * default['median']:.2g} cores keep up with the default" if default else ""
    return (
        f"{data['stored']:.2f} ms per pair on one core to decode, crop and draw noise{cores}; from images of twice the "
        f"side {data['large']:.2f} ms, {data['draft']:.2f} with --draft_decoding"
    )


def show_margins(base: dict[str, Any]) -> str:
    """The mean margin of every contestant's first update, which should be exactly 0."""
    rounds = [(name, r) for race in RACES for name, result in base.get(race, {}).items() for r in result["rounds"]]
    margins = [(name, r["equal_models_margin"]) for name, r in rounds if "equal_models_margin" in r]
    wrong = dict.fromkeys(f"{margin:.3g} ({name})" for name, margin in margins if margin)
    return ", ".join(wrong) or f"0 in all {len(dict(margins))} contestants"


def markdown(results: dict[str, Any]) -> str:
    """All tables of a run."""
    about = f"{results['name']}, torch {results['versions']['torch']}, {results['date']}"
    texts = [f"Measured on {about}, by `{results['command']}`.", show_counts(results["bases"])]
    for name, base in results["bases"].items():
        peak, copy_rate = base["ceilings"]["matmul_flops_per_second"], base["ceilings"]["copy_bytes_per_second"]
        batch = f"{base['train_batch_size']} pairs x {base['gradient_accumulation_steps']} micro-steps per update"
        lines = [
            f"- ceilings: matmul {peak / 1e12:.3g} TFLOP/s, copy {copy_rate / 1e9:.3g} GB/s",
            f"- baseline's FLOPs: {show_check(base['baseline_flops'])}",
            f"- safeguard: {show_safeguard(base['safeguard'])}",
            f"- data: {show_data(base)}",
            f"- margins of policies that equal their reference: {show_margins(base)}",
        ]
        compiled = base.get("against_baseline", {}).get("fast, compiled", {})
        if "ratio_to_fast" in compiled:
            first, ratio = compiled["rounds"][0]["first_update_s"], show_ratio(compiled["ratio_to_fast"])
            lines.append(f"- compiled blocks: {ratio} times as fast as without; the first update took {first:.0f} s")
        texts += [f"### {name}, {base['resolution']} px, {batch}", "\n".join(lines)]
        texts += [show_race(base[race]) for race in RACES if race in base]
    return "\n\n".join(texts) + "\n"
