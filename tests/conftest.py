"""What all tests share."""

from hypothesis import settings

# The machines that run these tests are small and shared: a slow example is no failure.
settings.register_profile("project", deadline=None)
settings.load_profile("project")
