"""`python -m mocov3_hf COMMAND` and `accelerate launch -m mocov3_hf COMMAND`: the same as `mocov3 COMMAND`."""

from mocov3_cli import main


if __name__ == "__main__":
    main()
