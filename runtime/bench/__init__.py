"""Load on a backend: replays of recorded traces and synthetic mixes, measured request by request."""
