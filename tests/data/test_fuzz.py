import fuzz


def test_spoilt_input_ends_in_right_data_a_cause_or_one_line(tmp_path):
    """A slice of `make fuzz`."""
    fuzz.prepare(tmp_path)
    outcomes, failures = fuzz.fuzz(150, 0, tmp_path)
    assert not failures, "\n".join(failures)
    assert set(outcomes) == set(fuzz.KINDS) and all(
        ended["inputs"] > 20 for ended in outcomes.values()
    )
