from nnunet_xattnres.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
