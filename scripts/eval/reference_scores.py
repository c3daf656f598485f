"""Scores by the packages hpsv2 and image-reward themselves; run by check_scorers.py in their own environment.

reference_scores.py METRIC ROWS.json SCORES.json PART=PATH ...: rows are [image, prompt], scores one number each.
"""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace


def hpsv2(rows, checkpoint):
    """Scores of hpsv2.img_score.score."""
    sys.modules["turtle"] = SimpleNamespace(forward=None)  # imported by mistake, fails where Python has no tkinter
    from hpsv2 import img_score

    # The package fetches LAION's weights, only to replace them, and reads its checkpoint anew for every image.
    create = img_score.create_model_and_transforms
    img_score.create_model_and_transforms = lambda name, _, **options: create(name, checkpoint, **options)
    img_score.torch.load = functools.cache(img_score.torch.load)
    return [float(img_score.score(image, prompt, cp=checkpoint)[0]) for image, prompt in rows]


def imagereward(rows, checkpoint, med_config, tokenizer):
    """Scores of ImageReward's `score`."""
    import ImageReward
    from ImageReward.models.BLIP import blip

    load = blip.BertTokenizer.from_pretrained
    blip.BertTokenizer.from_pretrained = lambda _: load(tokenizer)  # the name in the package is the hub's
    model = ImageReward.load(checkpoint, device="cpu", med_config=med_config)
    return [model.score(prompt, image) for image, prompt in rows]


if __name__ == "__main__":
    metric, source, target, *parts = sys.argv[1:]
    score = {"hpsv2": hpsv2, "imagereward": imagereward}[metric]
    scores = score(json.loads(Path(source).read_text()), **dict(part.split("=", 1) for part in parts))
    Path(target).write_text(json.dumps(scores))
