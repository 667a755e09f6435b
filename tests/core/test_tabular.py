from hypothesis import given
from hypothesis import strategies as st

from infoq_fx.core.tabular import align_rows, html_table

CELLS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=8).map(str.strip)
ROWS = st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=6))


@given(ROWS)
def test_every_cell_stands_in_its_column(rows):
    lines = align_rows(rows, left=1)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines, strict=True):
        start = 0
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            shown = line[start : start + width]
            assert shown.strip() == cell
            assert shown.ljust(width) == (cell.ljust(width) if i == 0 else cell.rjust(width))
            start += width + 2


def test_html_is_escaped_and_heads_rows_and_columns():
    text = html_table("<caption>", [["a", "b"], ["<x>", "1 & 2"]], ["note <"])
    assert "&lt;caption&gt;" in text
    assert '<th scope="col" style="text-align:left">a</th>' in text
    assert '<th scope="row" style="text-align:left">&lt;x&gt;</th>' in text
    assert '<td style="text-align:right">1 &amp; 2</td>' in text
    assert "<p>note &lt;</p>" in text
