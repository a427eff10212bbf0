"""The main job: a recipe in, a cheaper model and a report out."""
