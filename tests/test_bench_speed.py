"""What bench/speed.py makes of its figures."""

from __future__ import annotations

from xml.dom import minidom

import pytest

from speed_figures import plot, projection, timed

FOUND = {
    "machine": {"gpu": "a <card>"},
    "config": "config.json",
    "copy_tb_s": 2.4,
    "bf16 eager b1": {"ms_per_frame": 108.6},
    "int4 whole b1": {"sampled_ms": 2.5, "greedy_ms": 2.4},
    "int4 graph b4": {"sampled_ms": 5.0},
    "int4 roofline": {"frame_mb": 3600.0},
    "int4/int4 whole b1": {"error": "it failed"},
    "int4 products": [{"us": 3.0}],
}


def test_rows_know_what_their_bytes_take():
    rows = {row.name: row for row in timed(FOUND)}
    assert list(rows) == ["bf16 eager b1", "int4 whole b1", "int4 graph b4"]
    assert rows["int4 whole b1"].bytes_ms == pytest.approx(1.5)
    assert rows["int4 whole b1"].projected(360) == pytest.approx((10, 11))
    assert rows["int4 graph b4"].batch == 4
    assert rows["bf16 eager b1"].projected(360) is None
    assert projection(FOUND)[1].split() == "int4 whole b1 10.00 11.00, 7.3 times real time".split()
    assert projection({}) == []


def test_the_plot_is_a_picture_of_its_own():
    drawn = plot(FOUND)
    assert minidom.parseString(drawn).documentElement.tagName == "svg"
    assert "a &lt;card&gt;" in drawn
    assert "108.60" in drawn
    assert plot({}) == ""
