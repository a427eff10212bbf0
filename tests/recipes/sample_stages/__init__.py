"""Stages for the tests of the main job: every kind of pass, edit and form in a few lines each."""
