"""claims.py: which of the paper's claims held here? The table "What held" of READING.md.

Every experiment writes its claims into its results/*.json: what the paper reports, what came out
here, the interval of that, and a verdict by a rule that the experiment states. This file only
puts them into one table, in the paper's order. A test compares READING.md with it.

Run         python experiments/claims.py             prints the table
            python experiments/claims.py --write     puts it into READING.md
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from devices import command
from options import write_atomically

# results/NAME.json: where the paper has it
PLACES = {
    "table1_2_fig3_formulations": "Tables 1, 2, Fig. 3",
    "table3_fig10_autoencoders": "Table 3, Fig. 10",
    "table4_captions": "Table 4",
    "fig4_backbones": "Fig. 4",
    "fig5_qk_norm": "Fig. 5",
    "fig6_shift": "Fig. 6",
    "fig8_table5_scaling": "Fig. 8, Table 5",
    "table6_steps": "Table 6",
    "fig9_text_encoders": "Fig. 9",
    "table7_encoders": "Table 7",
    "fig11_densities": "Fig. 11",
    "fig14_dpo": "Fig. 14",
    "fig15_editing": "Fig. 15",
    "fig16_deduplication": "Fig. 16",
    "fig17_memorization": "Fig. 17",
}
VERDICTS = ("held", "did not hold at this size", "cannot be told")
BEGIN, END = "<!-- claims -->", "<!-- end of claims -->"


def rows() -> list[str]:
    """One markdown line for each claim."""
    lines = []
    for name, place in PLACES.items():
        file = ROOT / "results" / f"{name}.json"
        if not file.is_file():
            continue
        for entry in json.loads(file.read_text()).get("claims", ()):
            if entry["verdict"] not in VERDICTS:
                raise ValueError(f"{file} has the verdict {entry['verdict']!r}; use {VERDICTS}")
            here, interval = str(entry["here"]), entry.get("interval")
            if isinstance(interval, list):
                interval = f"{interval[0]:.3g} to {interval[1]:.3g}"
            if interval:
                here += f" ({interval})"
            cells = (place, entry["claim"], entry["paper"], here, entry["verdict"])
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def table() -> str:
    """The whole table, between its marks."""
    head = ["| where | claim | the paper | here (interval) | verdict |", "|---|---|---|---|---|"]
    return "\n".join([BEGIN, *head, *rows(), END])


def main():
    """Print the claims, or write them into READING.md."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into READING.md")
    options = parser.parse_args()
    print(table())
    if options.write:
        page = ROOT / "READING.md"
        before, rest = page.read_text().split(BEGIN)
        after = rest.split(END)[1]
        write_atomically(page, partial(Path.write_text, data=before + table() + after))


if __name__ == "__main__":
    command(main)
