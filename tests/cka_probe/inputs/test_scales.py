import pytest

from cka_probe.inputs.views import check_reference, check_scales, parse_scales


@pytest.mark.parametrize(
    ("text", "sides"),
    [("32", [32]), ("32,64", [32, 64]), (" 224 , 32", [224, 32]), ("+8", [8])],
)
def test_scales_of_a_command_line(text, sides):
    assert parse_scales(text) == sides


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("banana", "bad scale: 'banana': give sides in pixels"),
        ("-4", "bad scale: -4: "),
        ("0", "bad scale: 0: "),
        ("32,0", "bad scale: 0: "),
        ("32,32", "scale given twice: 32: "),
        ("", "no scales: '': "),
        (" ", "no scales: ' ': "),
        ("32,,64", "bad scale: '': "),
        ("32;64", "bad scale: '32;64': "),
        ("3_2", "bad scale: '3_2': "),
        ("32.0", "bad scale: '32.0': "),
        ("1e2", "bad scale: '1e2': "),
    ],
)
def test_bad_scales_of_a_command_line(text, what):
    with pytest.raises(ValueError, match=f"^{what}") as caught:
        parse_scales(text)
    assert str(caught.value).count(": ") == 2


@pytest.mark.parametrize("scales", [32, "32", [32.0], ["32"], [True], [None]])
def test_scales_that_are_no_whole_numbers(scales):
    with pytest.raises(TypeError, match=r"^(bad scale|scales is no list): .*: give"):
        check_scales(scales)


def test_the_reference_is_one_of_the_scales():
    assert check_reference("64", [32, 64]) == check_reference(64, [32, 64]) == 64
    with pytest.raises(ValueError, match=r"^reference is not a scale: '48': choose one of 32, 64"):
        check_reference(48, [32, 64])
