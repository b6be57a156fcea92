"""The installation on this machine: compiler, caches, files that come with the package, tunings."""
