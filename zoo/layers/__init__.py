"""Layers shared by the models of several domains; nothing here imports the rest of the project."""
