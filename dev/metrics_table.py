"""The metrics of one run of each script, in one table: python dev/metrics_table.py RUN...

Writes results/metrics/metrics.csv, a row a script, step and metric; success_rate among them. The
site's page of a script shows them beside what each metric means.
"""

import csv
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "results/metrics/metrics.csv"
ONLY_EVALUATED = ("success_rate",)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def rows_of(run):
    """(script, step, metric, value) of a run's files."""
    record = json.loads((run / "args.json").read_text())
    script = Path(record["script"]).name
    if script != "qam_offline_to_online.py":  # that has a page of its own
        script = script.replace("_offline_to_online", "")
    rows = []
    for row in read(run / "metrics.csv"):
        step = row.pop("step")
        del row["seed"]
        rows += [(script, step, name, value) for name, value in row.items()]
    for row in read(run / "eval.csv"):
        rows += [(script, row["step"], name, row[name]) for name in ONLY_EVALUATED]
    return rows


def main():
    rows = []
    for run in sorted(sys.argv[1:]):
        rows += rows_of(Path(run))
    PATH.parent.mkdir(parents=True, exist_ok=True)
    with PATH.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("script", "step", "metric", "value"))
        writer.writerows(rows)
    print(f"wrote {len(rows)} rows to {PATH}")


if __name__ == "__main__":
    main()
