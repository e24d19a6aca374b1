"""Models from video to text.

Shapes: B clips, F frames of all clips together, N features of a clip, L target tokens, V tokens of
the vocabulary, C and D widths.
"""
