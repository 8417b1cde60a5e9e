"""Draws assets/loss.svg from results/bench.json: python assets/loss.py"""
import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GREY, BLUE, ORANGE = "#7d8590", "#3b82f6", "#e07b00"    # readable on white and on black


def draw() -> None:
    """Perplexity against seconds of the rows of `python tests/bench.py loss`."""
    rows = json.loads((ROOT / "results/bench.json").read_text("utf-8"))["loss"]["rows"]
    yardstick, ours = rows[0]["curve"], rows[1]["curve"]
    values = [perplexity for _, perplexity in yardstick + ours]
    low, high, end = min(values) * 0.9, max(values) * 1.05, yardstick[-1][0] * 1.02
    parts = []

    def x(seconds):
        return 64 + 640 * seconds / end

    def y(perplexity):
        return 300 - 270 * math.log(perplexity / low) / math.log(high / low)

    def line(x1, y1, x2, y2, more):
        parts.append(f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{GREY}" {more}/>')

    def text(x, y, words, anchor="middle", colour=GREY, more=""):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {more}>'
                     f'{words}</text>')

    # The axes: grid lines at round perplexities, about eight ticks of seconds.
    rounded = [20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1000, 2000, 3000, 4000]
    for perplexity in [value for value in rounded if low < value < high]:
        line(64, y(perplexity), 704, y(perplexity), 'stroke-opacity="0.25"')
        text(56, y(perplexity) + 4, perplexity, "end")
    steps = [m * 10 ** n for n in range(-2, 6) for m in (1, 2, 5)]
    step = next(value for value in steps if end / value <= 8)
    for i in range(int(end / step) + 1):
        line(x(i * step), 300, x(i * step), 305, "")
        text(x(i * step), 320, f"{i * step:g}")
    line(64, 300, 704, 300, "")
    text(384, 342, "seconds of training")
    text(-165, 18, "perplexity on validation", more='transform="rotate(-90)"')

    # The curves fall: above and to the right of any of their points there is room for a name.
    names = (yardstick, ORANGE, "plain GPT, AdamW", 4), (ours, BLUE, "nanoplan, stage lm", -1)
    for curve, colour, name, at in names:
        points = [(x(seconds), y(perplexity)) for seconds, perplexity in curve]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" '
                     'stroke-linejoin="round"/>')
        (across, down), (seconds, perplexity) = points[-1], curve[-1]
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{colour}"/>')
        text(points[at][0] + 10, points[at][1] - 6,
             f"{name}: {perplexity:.1f} after {seconds:.0f} s", "start", colour,
             'font-weight="bold"')
    svg = "\n".join(parts)
    (ROOT / "assets/loss.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 352" '
        f'font-family="sans-serif" font-size="13">\n{svg}\n</svg>\n', "utf-8")


if __name__ == "__main__":
    draw()
