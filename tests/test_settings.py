"""The parameters of every training page: declared once, resolved in one order, and part of the run's identity."""

import dataclasses

import pytest
from notebook_text import NOTEBOOKS, accepted, declaration

from finematch.config import OUTSIDE_IDENTITY, ParameterError, Settings, declared
from finematch.models import configs

CONFIGS = {
    "mvam": [configs.MVAMConfig], "hslm": [configs.HSLMConfig], "felga": [configs.FELGAConfig],
    "slan": [configs.LocatorConfig, configs.SLANConfig], "arena": [],
}  # fmt: skip
TASKS = {
    "slan_localization": [configs.LocalizationConfig],
    "slan_captioning": [configs.CaptioningConfig],
    "slan_vqa": [configs.AnsweringConfig],
    "slan_nlvr2": [],
    "slan_video": [configs.VideoConfig],
}  # what a run of a method is fine-tuned for
PAGES = {method: f"{method}/2_train.py" for method in CONFIGS} | {
    "slan_localization": "slan/6_localization.py",
    "slan_captioning": "slan/5_captioning.py",
    "slan_vqa": "slan/7_vqa.py",
    "slan_nlvr2": "slan/8_nlvr2.py",
    "slan_video": "slan/9_video.py",
}
PARAMETERS = [(method, name) for method in PAGES for name in declared(method)]

each_method = pytest.mark.parametrize("method", PAGES)


def source(method):
    return NOTEBOOKS / PAGES[method]


def other_value(one, value):
    """Another value that the parameter accepts."""
    if one.choices:
        return next(choice for choice in one.choices if choice != value)
    if one.kind is bool:
        return not value
    if one.kind is tuple:
        return "1.0, 0.5, 0.25" if value != (1.0, 0.5, 0.25) else "1.0, 0.5, 0.5"
    if one.kind is str:
        return value + "x"
    low, high = one.range or (0, 10**6)
    middle = type(value)(low + (high - low) / 2)
    return next(
        new
        for new in (value + 1, value - 1, middle, type(value)(high))
        if low <= new <= high and new != value
    )


@each_method
def test_the_page_declares_every_preset_value_and_every_setting_of_the_model(method):
    page, known = declaration(source(method)), declared(method)
    presets = {name for name, one in known.items() if one.presets}
    fields = {field.name for config in (CONFIGS | TASKS)[method] for field in dataclasses.fields(config)}
    assert presets | fields <= set(page) == set(known)
    for name, (kind, default, comment) in page.items():
        one = known[name]
        assert default == one.page_default
        assert (default is None) == (name in presets | fields or name == "reading")
        assert kind == ("str" if one.kind is tuple else one.kind.__name__)
        assert comment == one.comment


@each_method
def test_a_preset_value_fits_the_rules_of_its_setting(method):
    for name, one in declared(method).items():
        assert one.presets == {} or list(one.presets) == ["tiny", "photos", "paper"], name
        for value in (*one.presets.values(), *([one.literal] if one.literal is not None else [])):
            assert one.accept(value) == value
            assert type(value) is one.kind, f"{name} = {value!r}"


@each_method
def test_lines_of_the_parameters_fit_the_page(method):
    """Longer ones would be broken by the formatter, and papermill's inspector does not read broken lines."""
    for line in (one.line for one in declared(method).values()):
        assert len(line) <= 118, line
        assert line == line.strip()


@pytest.mark.parametrize(("method", "name"), PARAMETERS)
def test_each_parameter_changes_the_identity_or_says_why_not(method, name):
    base = accepted(source(method))
    value = other_value(declared(method)[name], getattr(base, name))
    changed = accepted(source(method), {name: value})
    assert changed.as_dict() != base.as_dict()
    if name in OUTSIDE_IDENTITY:
        assert OUTSIDE_IDENTITY[name]
        assert changed.identity() == base.identity()
    else:
        assert changed.identity() != base.identity()


@pytest.mark.parametrize("name", OUTSIDE_IDENTITY)
def test_what_is_outside_the_identity_is_a_parameter_somewhere(name):
    assert any(name in declared(method) for method in PAGES)


@each_method
def test_identity_and_settings_do_not_depend_on_how_they_were_given(method):
    base = accepted(source(method))
    spelt = {n: getattr(base, n) for n, one in declared(method).items() if one.page_default is None}
    assert Settings(method, spelt) == base
    assert Settings(method, base.as_dict()) == base
    assert base.changed == {}


def test_order_of_what_fills_in_the_unset():
    """Explicit, then the overlays of the file, then the literal reading, then the preset, then the config."""
    assert Settings("slan", {}).mlm_weight == 0.0  # preset
    assert Settings("slan", {"reading": "literal"}).mlm_weight == 1.0  # literal before preset
    paper = {"scale": "paper", "pretrained": "a.safetensors"}
    assert Settings("slan", paper).mlm_weight == 0.0  # overlay before literal
    assert Settings("slan", {**paper, "mlm_weight": 0.5}).mlm_weight == 0.5  # explicit before all
    assert Settings("slan", {}).momentum == 0.995  # config
    assert Settings("slan", {"scale": "paper"}).reading == "literal"
    assert Settings("slan", {"scale": "paper", "reading": "default"}).attn == "transformer"


def test_settings_say_what_differs_from_the_preset():
    s = Settings("mvam", {"views": 8, "epochs": 3, "dataset": "flickr8k"})
    assert s.given == {"views": 8, "epochs": 3, "dataset": "flickr8k"}
    assert s.changed == {"views": 16, "epochs": 5}
    assert "preset photos" in repr(s)
    assert "* views = 8" in repr(s)
    assert "  tau = 0.07" in repr(s)
    assert "<td>views</td><td>8</td><td>16</td>" in s._repr_html_()
    with pytest.raises(AttributeError, match="frozen"):
        s.views = 4
    with pytest.raises(AttributeError, match="did you mean 'views'"):
        s.veiws  # noqa: B018


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"veiws": 8}, "unknown parameter 'veiws': did you mean 'views'"),
        ({"epochs": 0}, r"epochs = 0: must lie in \[1, 1000\]"),
        ({"epochs": 2.5}, "'epochs' must be int"),
        ({"projection": "splitt"}, "projection is 'splitt'; use .*did you mean 'split'"),
        ({"seed": None}, "'seed' must be int, not NoneType"),
        ({"reading": "litteral"}, "reading is 'litteral'; use 'default' or 'literal'"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ParameterError, match=message):
        accepted(source("mvam"), given)


def test_a_page_that_disagrees_with_its_declarations_is_refused():
    from finematch.config import settings

    namespace = {"__annotations__": {"dataset": "str", "colour": "str"}, "dataset": "scenes", "colour": "red"}
    with pytest.raises(
        ParameterError, match=r"disagree: the page lacks \[.*'views'.*has besides \['colour'\]"
    ):
        settings(namespace, "mvam")


def test_numbers_with_commas():
    assert Settings("slan", {"ratios": "1.0, 0.5,0.25"}).ratios == (1.0, 0.5, 0.25)
    assert Settings("slan", {"scale": "paper"}).stages == (2, 3, 4)
    assert Settings("slan", {"stages": "1,2"}).stages == (1, 2)
    for wrong in ("a", "1,,b", "nan", [float("inf")]):
        with pytest.raises(ParameterError, match="numbers"):
            Settings("slan", {"ratios": wrong})


@pytest.mark.parametrize(
    ("options", "says"),
    [({"pooling": "max"}, "pooling is 'max'; use "), ({"views": 0}, r"views = 0: must lie in \[1, 256\]")],
)
def test_a_config_refuses_by_name_value_and_choices(options, says):
    with pytest.raises(ValueError, match=says):
        configs.MVAMConfig(**options)


def test_a_config_is_made_of_settings_or_of_the_parameters_of_a_run():
    s = Settings("mvam", {"views": 4})
    assert configs.MVAMConfig.of(s) == configs.MVAMConfig.of(s.as_dict())
    assert configs.MVAMConfig.of(s, total_dim=32).total_dim == 32
    assert configs.MVAMConfig.of({"views": 4, "elsewhere": 1}) == configs.MVAMConfig(views=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        configs.MVAMConfig().views = 2
