"""What the API answers is described: one text serves reader and OpenAPI."""

from __future__ import annotations

import pytest

from services.contracts import views


@pytest.mark.parametrize("view", views.View.__subclasses__(), ids=lambda view: view.__name__)
def test_every_field_of_an_answer_is_described(view: type[views.View]) -> None:
    assert {name for name, field in view.model_fields.items() if not field.description} == set()


def test_a_client_ignores_fields_that_a_newer_server_adds() -> None:
    answer = views.ReplayView.model_validate({"run_id": "r", "letter": "1-0", "index": 3, "later": True})
    assert answer == views.ReplayView(run_id="r", letter="1-0", index=3)
