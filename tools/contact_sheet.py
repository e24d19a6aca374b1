"""Draws the README's contact sheet: `python tools/contact_sheet.py OUT.jpg`.

A row is a sentence of the embedded corpus, every 4th frame of it.
"""

import sys

import cv2
import numpy as np

from flallm.data.corpora import synthetic
from flallm.data.encode import EncodeOptions, encode
from flallm.data.transforms import decode

SIDE, FRAMES, CLIPS = 150, 9, 5


def row(clip) -> np.ndarray:
    data, meta = encode(clip, EncodeOptions())
    frames = decode(data, SIDE, 4, 10_000, meta["num_frames"])[:FRAMES]
    strip = np.full((SIDE + 24, SIDE * FRAMES, 3), 255, np.uint8)
    strip[24:, : SIDE * len(frames)] = np.concatenate(frames, 1)
    caption = f"{clip.gloss}  -  {clip.text}"
    cv2.putText(
        strip, caption, (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (30, 30, 30), 1, cv2.LINE_AA
    )
    return strip


if __name__ == "__main__":
    clips = [
        c
        for c in synthetic.clips(train=60, dev=0, test=0, size=256)
        if 3 <= len(c.gloss.split()) <= 4
    ]
    picked = list({c.signer: c for c in clips}.values())[:CLIPS]
    cv2.imwrite(sys.argv[1], np.concatenate([row(c) for c in picked])[..., ::-1])
