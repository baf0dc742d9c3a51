"""`python -m forge_ray`: the command line of whichever interpreter and tree comes first."""

from forge_ray.cli import main

if __name__ == "__main__":
    main()
