"""The only folder that imports axolotl: config arguments, plugin hooks, command line."""
