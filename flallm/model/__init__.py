"""Shape legend: B clips, F frames of all clips together, N sign-wise features of a clip, L target tokens, C and D widths."""
