from __future__ import annotations

import ray.data

from forge_ray.placement import label_selector, stay_on


def test_later_tasks_of_a_process_do_not_inherit_labels() -> None:
    options = ray.data.DataContext.get_current().execution_options
    stay_on({"ray.io/market-type": "!spot"})
    assert label_selector() == options.label_selector == {"ray.io/market-type": "!spot"}
    stay_on({})
    assert label_selector() == {}
    assert options.label_selector is None
