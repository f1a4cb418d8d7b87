import pytest

pytest.register_assert_rewrite("tests.support")  # its assertions show their values, like those of the tests
