"""The demo's refusals, skills and speed, as a result file.

python benchmarks/bench_demo.py --out benchmarks/results/demo-cpu.jsonl
python benchmarks/bench_demo.py --model smollm2-refuses --rounds 5
    --out benchmarks/results/smollm2-refuses-cpu.jsonl

Other options are the demo's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from refusal_kernels.bench.records import write_records


def rows_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rates of refusal, skills and speed of every method."""
    rows: list[dict[str, Any]] = []
    for category, rates in report["refusal_rate"].items():
        for method, rate in rates.items():
            low, high = report["refusal_interval"][category][method]
            row = {"method": method, "prompts": category, "refused": rate}
            count = report["prompts"]["test"][category]
            rows.append({**row, "low": low, "high": high, "count": count})
    for method, skills in report["skills"].items():
        if not skills:  # a control
            continue
        right = report["capability"].get(method)
        rows.append({"method": method, "skills": skills, "right": right})
    for text, losses in report["cross_entropy"].items():
        rows += [{"method": method, "text": text, "nats": nats} for method, nats in losses.items()]
    for method, speed in report["speed"].items():
        low, high = speed["quartiles"]
        row = {"method": method, "ratio": speed["median"]}
        row |= {"ratio_q1": low, "ratio_q3": high, "rounds": speed["rounds"]}
        rows.append({**row, "tokens_per_second": speed["tokens_per_second"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy")
    parser.add_argument("--rounds", default="31")
    parser.add_argument("--out", type=Path, required=True, help="write the results here")
    parser.add_argument("--report", type=Path, help="of a demo that has run; then none is run")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "refusal_kernels", "demo", "--device", "cpu"]
        command += ["--model", options.model, "--rounds", options.rounds, "--out", folder]
        # 1: not all is as expected
        if options.report is None and subprocess.run([*command, *more]).returncode > 1:
            raise SystemExit("the demo failed")
        report = json.loads((options.report or Path(folder) / "report.json").read_text())
    head = {"what": f"the demo: refusals, skills and speed of {report['model']}"}
    head |= {"device": report["device"], "versions": report["versions"]}
    head |= {"prompts": report["prompts"]}
    head |= {name: report["selection"][name] for name in ("layer", "position")}
    head |= {"sites": report["sites"]["claimed"], "residual": report["residual"]["max_abs_score"]}
    write_records(options.out, {**head, "rows": rows_of(report)})


if __name__ == "__main__":
    main()
