"""The launcher's watch over a run: silence, deaths, and whether starting again makes sense."""
