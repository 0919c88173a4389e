"""Labels of figures, and words of records that may be none."""

from __future__ import annotations

from registry.wire.labels import MEASURED, Label, label_of, worst, worst_word


def test_the_worst_label() -> None:
    """A sum has the worst label of its parts; a sum of nothing has no figure."""
    assert worst([Label.MEASURED, Label.MODELED, Label.MEASURED_SAMPLED]) is Label.MODELED
    assert worst([]) is Label.UNAVAILABLE


def test_the_worst_word() -> None:
    """Words of records are ranked like labels; a word that is no label is trusted least."""
    assert worst_word(["measured", "modeled", "measured_sampled"]) == "modeled"
    assert worst_word([]) == "unavailable"
    assert worst_word(["unavailable", "guessed"]) == "guessed"


def test_a_record_names_a_label() -> None:
    """A missing word, or one that is not known, names no figure; what hardware measured are two labels."""
    assert [label_of(word) for word in ("sourced", None, "a word of the future")] == [
        Label.SOURCED,
        Label.UNAVAILABLE,
        Label.UNAVAILABLE,
    ]
    assert {"measured", "measured_sampled"} == MEASURED
