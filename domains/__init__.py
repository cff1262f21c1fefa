"""The application domains of the zoo, one package each; the registry imports them by name."""
