"""report.py: what evaluate.py found, as one HTML file that needs no other and no network.

Read with   Sec. 5: a number alone says little, so the page shows the pictures behind it
Not here    the measures (metrics.py), the score (geneval.py), what is drawn (evaluate.py)
Shapes      M drawn pictures   N training pictures   d width of the features
Run         python evaluate.py runs/NAME     writes runs/NAME/report.html
"""

import base64
import html
import io
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image

from metrics import clip_scores
from options import write_atomically
from scenes import captioned_grid

NOTES = """Each prompt of GenEval is drawn once. A picture passes if it shows what is asked and
nothing else; "lax" is GenEval's own rule. Behind each task stands its 95 % interval (Wilson)."""


def html_grid(title, pictures, texts):
    """A heading, and one picture inside of the page: pictures, four in a row, above their texts."""
    small = []
    for picture in pictures:
        small.append(Image.fromarray(np.asarray(picture)))
        small[-1].thumbnail((256, 256))
    content = io.BytesIO()
    captioned_grid(small, texts, 4).save(content, "PNG")
    code = base64.b64encode(content.getvalue()).decode()
    return f'<h2>{title}</h2><img src="data:image/png;base64,{code}" alt="">\n'


def svg_curve(title, points):
    """A heading, and a curve of (x, y), both above 0, drawn from 0."""
    right, top = np.max(points, axis=0)
    places = ""
    for x, y in points:
        places += f" {600 * x / right:.1f},{200 - 200 * y / top:.1f}"
    return (f'<h2>{title}: from 0 to {right:g}, values from 0 to {top:.3f}</h2>'
            f'<svg width="600" height="200" style="background: #eee">'
            f'<polyline points="{places}" fill="none" stroke="black"/></svg>\n')


def html_curves(measured, losses, log):
    """The loss of `measured` pictures by t, and the curves of a run. log: its entries, each with a
    step."""
    page = svg_curve(f"Loss of {measured} by t", list(zip(np.linspace(0, 1, 8), losses)))
    for name in ("loss", "validation"):
        points = []
        for entry in log:
            if entry.get(name):
                points.append((entry["step"], entry[name]))
        if points:
            page += svg_curve(f"{name} by step", points)
    return page


def html_pictures(pictures, prompts, measure):
    """The prompts with the highest and the lowest CLIP scores, and the first pictures."""
    count = len(pictures)
    scores = clip_scores(measure.features(pictures), measure.text_features[:count])      # (M,)
    best_first = scores.argsort(descending=True).tolist()
    chosen = {"Best prompts": best_first[:8], "Worst prompts": best_first[-8:],
              "Pictures": range(min(24, count))}
    page = ""
    for title, numbers in chosen.items():
        shown = []
        texts = []
        for i in numbers:
            shown.append(pictures[i])
            texts.append(f"{scores[i]:.3f} {prompts[i]}")
        page += html_grid(f"{title}, with CLIP scores", shown, texts)
    return page


def nearest_pictures(pictures, measure, training):
    """Each picture, then the three of up to 512 training pictures whose features have the highest
    cosines with its own: pictures, texts."""
    height, width = np.asarray(pictures[0]).shape[:2]
    known = []
    for index in range(min(512, len(training))):
        known.append(training.image(index, height, width))
    features = measure.features(known)                                                   # (N, d)
    shown = []
    texts = []
    for picture in pictures:
        cosines = F.cosine_similarity(measure.features([picture]), features)             # (N,)
        shown.append(picture)
        texts.append("drawn")
        for place in cosines.topk(3).indices.tolist():
            shown.append(known[place])
            texts.append(f"{cosines[place]:.3f} {training.captions(place)[-1]}")
    return shown, texts


def write_report(file, record, log, pictures, prompts, measure, known, training):
    """One page: what was printed, curves, pictures, and what resembles a training picture.

    record: the numbers of evaluate.py. log: entries of a run's log.jsonl, or none. pictures: drawn
    from prompts, which begin those of `measure`, a PictureMeasures. known: what the page calls the
    pictures of the set `training`. With --data, nobody knows whether they were seen in training.
    """
    measured = "pictures of --data" if record["data"] else "unseen pictures"
    title = html.escape(record["checkpoint"])
    printed = html.escape("\n".join(record["printed"]))
    page = (f'<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>'
            f'<body style="font: 15px sans-serif; margin: 2em"><h1>{title}</h1><p>{NOTES}</p>'
            f'<pre style="overflow: auto">{printed}</pre>\n')
    page += html_curves(measured, record["losses"]["validation_by_t"], log)
    page += html_pictures(pictures, prompts, measure)
    nearest, texts = nearest_pictures(pictures[:8], measure, training)
    page += html_grid(f"Nearest {known}, with cosines of their features", nearest, texts)
    write_atomically(file, partial(Path.write_text, data=page, encoding="utf-8"))
