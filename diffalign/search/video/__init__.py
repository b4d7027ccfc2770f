"""Video made chunk after chunk: one file per family of pipelines that can extend a clip."""
