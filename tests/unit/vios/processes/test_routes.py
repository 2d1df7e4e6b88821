from __future__ import annotations

from farpage.vios.processes.routes import Routes


def test_volumes_are_spread_and_stay_where_they_are() -> None:
    routes = Routes(2)
    assert [routes.of(volume) for volume in ("a", "b", "c", "d")] == [0, 1, 0, 1]
    assert [routes.of(volume) for volume in ("d", "c", "b", "a")] == [1, 0, 1, 0]
    assert "a" in routes
    assert "e" not in routes


def test_a_deleted_volume_leaves_room_for_another_one() -> None:
    routes = Routes(2)
    for volume in ("a", "b", "c"):
        routes.of(volume)
    for volume in ("a", "c"):
        with routes.using(volume):
            routes.deleted(volume)
    assert "a" not in routes
    assert routes.of("d") == 0


def test_a_volume_that_is_asked_for_while_it_is_deleted_keeps_its_process() -> None:
    routes = Routes(2)
    with routes.using("a") as first:
        with routes.using("a"):
            routes.deleted("a")
            assert "a" in routes
        assert routes.of("a") == first
        routes.deleted("a")
    assert "a" not in routes
