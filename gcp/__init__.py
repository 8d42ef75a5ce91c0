"""From an empty project on Google Cloud to a finished run on a TPU slice: `python -m gcp --help`.

Needs Python 3.11 and the gcloud CLI, nothing else. `docs/google_cloud.md` shows the whole way.
"""
