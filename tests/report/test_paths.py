import pytest

from memplan.report.paths import Share, module_shares, numbers_text, path_range, pattern_of


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((), ""), ((3,), "3"), ((0, 1, 2, 5, 7, 8), "0-2,5,7-8"), ((2, 1, 1), "1-2"), (range(32), "0-31")],
)
def test_numbers_are_told_as_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert numbers_text(numbers) == text


def test_a_pattern_has_stars_for_numbers() -> None:
    assert pattern_of("model.layers.3.experts.12.w1") == "model.layers.*.experts.*.w1"
    assert pattern_of("") == ""


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (["lm_head"], "lm_head"),
        (["layers.4"], "layers.4"),
        (["layers.0", "layers.1", "layers.3"], "layers.0-1,3"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], "a.0-1.b.0-1"),
        ([""], ""),
    ],
)
def test_paths_of_one_pattern_have_one_name(paths: list[str], name: str) -> None:
    assert path_range(paths) == name


def test_repeated_modules_are_one_share() -> None:
    kept = {f"model.layers.{i}.{name}": size for i in range(3) for name, size in (("attn", 10), ("mlp", 30))}
    assert module_shares({**kept, "model.norm": 7}, {"model.layers.2.mlp": 5}) == (
        Share(
            name="model.layers.0-2",
            count=3,
            kept_bytes=120,
            largest_bytes=40,
            peak_bytes=5,
            inner=(Share("mlp", 3, 90, 30, 5), Share("attn", 3, 30, 10, 0)),
        ),
        Share("model.norm", 1, 7, 7, 0),
    )


def test_modules_that_differ_are_not_alike() -> None:
    (share,) = module_shares({"layers.0": 10, "layers.1": 20}, {})
    assert (share.kept_bytes, share.largest_bytes, share.alike) == (30, 20, False)
    assert share.inner == (Share("", 2, 30, 20, 0),)


def test_numbers_inside_repeated_modules_are_ranges_too() -> None:
    (share,) = module_shares({f"layers.{i}.experts.{j}.w": 1 for i in range(2) for j in range(4)}, {})
    assert [(inner.name, inner.count) for inner in share.inner] == [("experts.0-3.w", 8)]


def test_a_single_numbered_module_is_no_stack() -> None:
    (share,) = module_shares({"net.0.weight": 3}, {})
    assert share == Share("net.0.weight", 1, 3, 3, 0)


def test_a_model_that_is_a_list_itself_has_numbers_first() -> None:
    (share,) = module_shares({"0": 1, "1": 1, "2": 0}, {})
    assert (share.name, share.count) == ("0-1", 2)


def test_nothing_is_shared_where_nothing_is_held() -> None:
    assert module_shares({"a": 0}, {"b": 0}) == ()


def test_the_sums_are_kept() -> None:
    kept = {f"s.{i}.l.{j}.{name}": i + j + 1 for i in range(3) for j in range(4) for name in "ab"} | {"": 5, "head": 9}
    shares = module_shares(kept, kept)
    assert sum(share.kept_bytes for share in shares) == sum(share.peak_bytes for share in shares) == sum(kept.values())
    for share in shares:
        assert not share.inner or sum(inner.kept_bytes for inner in share.inner) == share.kept_bytes
