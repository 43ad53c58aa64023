"""Tests of report.py: curves to scale, neighbours by features, a page that loads nothing."""

import base64
import html.parser
import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data import to_tensor
from report import nearest_pictures, svg_curve, write_report
from scenes import Scenes


def test_a_curve_is_drawn_to_scale():
    """By hand: x to 2 over 600 px, y to 4 over 200 px, downwards."""
    curve = svg_curve("loss", [(1, 4), (2, 1)])
    assert 'points=" 300.0,0.0 600.0,150.0"' in curve and "to 2, values from 0 to 4.000" in curve


def test_the_nearest_training_picture_is_found_by_its_features():
    training = Scenes(30, seed=9)
    measure = SimpleNamespace(features=lambda pictures: torch.stack(
        [to_tensor(picture).flatten() for picture in pictures]))
    picture = Image.fromarray(training.image(17, 64, 64))
    shown, texts = nearest_pictures([picture], measure, training)
    assert len(shown) == len(texts) == 4 and texts[0] == "drawn"
    assert texts[1] == "1.000 " + training.captions(17)[1]
    assert (shown[1] == training.image(17, 64, 64)).all()
    assert float(texts[1][:5]) >= float(texts[2][:5]) >= float(texts[3][:5])


class Page(html.parser.HTMLParser):
    """What a page loads, how its curves go, and its text."""
    def __init__(self, file):
        super().__init__()
        self.sources, self.curves, self.text = [], [], ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        self.curves += [attributes["points"]] if tag == "polyline" else []

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("data, measured, known", [
    ("", "unseen pictures", "training pictures"), ("", "unseen pictures", "scenes"),
    ("photos", "pictures of --data", "pictures of --data")])
def test_the_report_of_a_run_has_the_curves_of_its_log(tmp_path, data, measured, known):
    """By hand: steps to 4 over 600 px, losses to 2 over 200 px; entries without a loss are left."""
    log = [{"step": 1, "loss": 2.0}, {"step": 4, "loss": 1.0, "validation": None},
           {"step": 4, "validation": 0.5}]
    training = Scenes(4, seed=9)
    pictures = [training.image(i, 64, 64) for i in range(4)]
    measure = SimpleNamespace(text_features=torch.eye(4), features=lambda x: torch.eye(4)[: len(x)])
    record = {"checkpoint": "a <b>", "data": data, "printed": ["1 < 2"],
              "losses": {"validation_by_t": [1] * 8}}
    write_report(tmp_path / "report.html", record, log, pictures, list("abcd"), measure, known,
                 training)
    page = Page(tmp_path / "report.html")
    assert page.curves[1:] == [" 150.0,0.0 600.0,100.0", " 600.0,0.0"]
    assert "1 < 2" in page.text and "a <b>" in page.text and len(page.sources) == 4
    assert f"Loss of {measured} by t" in page.text and f"Nearest {known}, with" in page.text
    for source in page.sources:
        kind, code = source.split(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(code))).verify()
