"""Hypothesis strategies of several tests: arbitrary JSON, and near misses of a text."""

from hypothesis import settings
from hypothesis import strategies as st

# The same examples in every run: failures are reproducible, and no build fails by chance.
BOUNDED = settings(derandomize=True, deadline=None, max_examples=500)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
LATIN_1 = st.characters(max_codepoint=255)


@st.composite
def near_misses(draw: st.DrawFn, text: str) -> str:
    """Return *text* with one to three characters changed, dropped, inserted or repeated."""
    for _ in range(draw(st.integers(1, 3))):
        at, other = draw(st.integers(0, len(text) - 1)), draw(LATIN_1)
        end = at + draw(st.integers(0, 3))
        text = draw(
            st.sampled_from(
                [
                    text[:at] + other + text[at + 1 :],
                    text[:at] + text[end:],
                    text[:at] + other + text[at:],
                    text[:at] + text[at:end] + text[at:],
                    text[:at] + text[at : at + 1].swapcase() + text[at + 1 :],
                ]
            )
        )
    return text
