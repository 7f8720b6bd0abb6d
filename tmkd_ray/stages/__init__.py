"""The stages of a run on a Ray cluster: the only place that imports Ray."""
